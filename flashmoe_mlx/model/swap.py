"""Replace a model's switch layers by streamed ones."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.checkpoint.manifest import Manifest
from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.fence import Fence
from flashmoe_mlx.layers.fused_decoder import FewLaunches
from flashmoe_mlx.layers.lookahead import Lookahead
from flashmoe_mlx.layers.native_cpu import use_native
from flashmoe_mlx.layers.readback import Mailbox
from flashmoe_mlx.layers.shared_expert import make_early
from flashmoe_mlx.layers.switch import ResidentSwitchGLU, StreamedSwitchGLU
from flashmoe_mlx.model.budget import experts_nbytes, plan, refuse_excess, spare_memory
from flashmoe_mlx.model.context import growing_layers, kv_token_nbytes, prefill_step_size, prefill_token_nbytes
from flashmoe_mlx.model.families import _ROUTERS, _SHARED_EXPERTS, _hidden, find_experts
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.model.precision import _itemsize, to_float32
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.memory_pressure import Pressure
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers, needs_pinned_memory
from flashmoe_mlx.streaming.pool import Pool, slot_nbytes
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.warm_start import load_residents
from flashmoe_mlx.system.memory import free_memory, limit_cache

_STAGED_EXPERTS = 32  # a token's, twice: those it needs, and those read ahead


def _stream_experts(model: nn.Module, checkpoint: Checkpoint, config: Config, native_top_k: int) -> Streaming:
    """Replace every switch layer of a lazily loaded model by a streamed one."""
    switches, tables = find_experts(model, checkpoint)
    top_k = config.experts_per_token or native_top_k
    fewest = min(table.experts for table in tables)
    if top_k > fewest:
        raise ValueError(f"experts_per_token is {top_k}, and a layer of {checkpoint.folder} has {fewest} experts")
    if mx.default_device().type == mx.cpu:
        use_native(model)
        to_float32(model)
    trunk_nbytes = _nbytes(model) - sum(map(_nbytes, switches.values()))
    ram_budget = spare_memory(trunk_nbytes, tables) if config.ram_budget == "auto" else config.ram_budget
    shares = plan(tables, ram_budget, top_k)
    slots_nbytes = sum(share.nbytes for share in shares)
    streamed = [share for share in shares if not share.all_resident]
    place_nbytes = max((slot_nbytes(share.tables[0]) for share in streamed), default=0) if needs_pinned_memory() else 0
    refuse_excess(trunk_nbytes, max(slots_nbytes, ram_budget) + _STAGED_EXPERTS * place_nbytes)
    itemsize = _itemsize(model)
    down = next(m.down_proj if isinstance(m, SwitchGLU) else m.fc2 for m in switches.values())
    token_nbytes = prefill_token_nbytes(
        checkpoint.config, top_k=top_k, hidden=down.output_dims, intermediate=down.input_dims, itemsize=itemsize
    )
    kv_token = kv_token_nbytes(checkpoint.config, growing_layers(model), itemsize)
    step_size = prefill_step_size(free_memory() - trunk_nbytes - slots_nbytes, token_nbytes)

    limit_cache()
    counters = Counters()
    reader = Reader(checkpoint.files, config.read_threads, counters, config.read_timeout)
    check = None
    if config.manifest is not None:
        check = ManifestCheck(Manifest.load(Path(config.manifest), checkpoint), tables)
    pinned = PinnedBuffers(place_nbytes, _STAGED_EXPERTS) if place_nbytes else None
    fence = Fence(counters, Mailbox() if place_nbytes else None)
    replaced: list[tuple[str, nn.Module]] = []
    places: dict[str, tuple[ExpertTable, Pool]] = {}
    for share in shares:
        if share.all_resident:
            replaced.extend((table.layer, ResidentSwitchGLU(switches[table.layer])) for table in share.tables)
            continue
        pool = Pool(share.slots, share.tables[0], reader, counters, pinned, check)
        places |= {table.layer: (table, pool) for table in share.tables}
    layers = {
        table.layer: StreamedSwitchGLU(switches[table.layer], table, pool, fence) for table, pool in places.values()
    }
    if config.lookahead and top_k:
        ordered = {table.layer: places.get(table.layer) for table in tables}
        _look_ahead(model, layers, ordered, top_k, _hidden(checkpoint.config))
    if not needs_pinned_memory():  # where the GPU shares the memory of the host
        own = [share.tables[0].layer for share in streamed if len(share.tables) == 1]
        pressure = Pressure([places[layer][1] for layer in own], max(1, top_k))
        for layer in own:
            layers[layer].slots_now = pressure.slots
    model.update_modules(tree_unflatten([*replaced, *layers.items()]))
    if config.warm_start is not None:
        load_residents(config.warm_start, places)
    pools = tuple({id(pool): pool for _, pool in places.values()}.values())
    return Streaming(
        counters=counters,
        experts_per_token=top_k,
        native_experts_per_token=native_top_k,
        trunk_nbytes=trunk_nbytes,
        slots_nbytes=slots_nbytes,
        experts_nbytes=experts_nbytes(tables),
        pools=pools,
        prefill_step_size=step_size,
        itemsize=itemsize,
        kv_token_nbytes=kv_token,
    )


def _look_ahead(
    model: nn.Module,
    layers: Mapping[str, StreamedSwitchGLU],
    places: Mapping[str, tuple[ExpertTable, Pool] | None],
    top_k: int,
    hidden: int | None,
) -> None:
    """Give each streamed layer the router of the next, where that is streamed and has a router by itself."""
    modules = dict(model.named_modules())
    for path, following in pairwise(places):
        place = places[following]
        block = modules[following.rpartition(".")[0]]
        router = next((block[name] for name in _ROUTERS if isinstance(block.get(name), nn.Module)), None)
        if path in layers and layers[path].hidden == hidden and place is not None and router is not None:
            layers[path].lookahead = Lookahead(router, top_k, *place)


def _start_early(model: nn.Module, hidden: int | None) -> None:
    """Let each streamed layer start its block's shared expert."""
    modules = dict(model.named_modules())
    for path, block in modules.items():
        streamed = next((child for child in block.children().values() if isinstance(child, StreamedSwitchGLU)), None)
        name = next((name for name in _SHARED_EXPERTS if isinstance(block.get(name), nn.Module)), None)
        layer = modules.get(path.rpartition(".")[0])
        if streamed is not None and isinstance(layer, FewLaunches):  # which begins it together with the router
            streamed.start_early = layer.start
        elif streamed is not None and streamed.hidden == hidden and name is not None:
            streamed.start_early = make_early(block[name]).start


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for _, parameter in tree_flatten(module.parameters()))
