"""Replace a model's switch layers by streamed ones."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from flashmoe_mlx.layers.lookahead import Lookahead
from flashmoe_mlx.layers.readback import make_readback
from flashmoe_mlx.layers.router_sync import RouterSync
from flashmoe_mlx.layers.shared_expert import overlap
from flashmoe_mlx.layers.switch import ResidentSwitchGLU, StreamedSwitchGLU, output_width
from flashmoe_mlx.model.budget import PoolPlan, auto_budget, experts_nbytes, plan_pools, refuse_excess
from flashmoe_mlx.model.context import growing_layers, kv_token_nbytes
from flashmoe_mlx.model.families import find_experts, hidden_size, router, shared_expert
from flashmoe_mlx.model.info import Streaming
from flashmoe_mlx.model.precision import compute_in_float32, itemsize
from flashmoe_mlx.model.prefill import ChunkMemory
from flashmoe_mlx.ops.dispatch import Backend
from flashmoe_mlx.streaming.bounce_buffers import BounceBuffers
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.keep_warm import make_keep_warm
from flashmoe_mlx.streaming.manifest_check import ManifestCheck
from flashmoe_mlx.streaming.memory_pressure import MemoryPressure
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers, needs_pinned_memory
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.warm_start import load_residents
from flashmoe_mlx.system.memory import available_memory, limit_cache

# Experts in bounce buffers at once: those a token needs, and those prefetched.
_BUFFERED_EXPERTS = 32


def stream_experts(
    model: nn.Module, checkpoint: Checkpoint, config: Config, native_top_k: int, backend: Backend
) -> Streaming:
    """Replace every switch layer of a lazily loaded model by a streamed or a resident one.

    Args:
        model (nn.Module): mlx-lm's, nothing of it evaluated.
        checkpoint (Checkpoint): Where its experts lie.
        config (Config): Budget and reads.
        native_top_k (int): The checkpoint's own number of experts per token.
        backend (Backend): The model's.

    Raises:
        ValueError: No routed experts, experts that cannot be read in place, or more per token than there are.
        MemoryError: Trunk and budget do not fit into free memory.
        OSError: A file cannot be opened, or an expert of the warm start not be read.
    """
    switches, tables = find_experts(model, checkpoint, backend)
    top_k = config.experts_per_token or native_top_k
    fewest = min(table.experts for table in tables)
    if top_k > fewest:
        raise ValueError(f"experts_per_token is {top_k}, and a layer of {checkpoint.folder} has {fewest} experts")
    if mx.default_device().type == mx.cpu:
        compute_in_float32(model, backend)

    trunk_nbytes = _nbytes(model) - sum(map(_nbytes, switches.values()))
    ram_budget = auto_budget(trunk_nbytes, tables) if config.ram_budget == "auto" else config.ram_budget
    plans = plan_pools(tables, ram_budget, top_k)
    slots_nbytes = sum(plan.nbytes for plan in plans)
    streamed = [plan for plan in plans if not plan.all_resident]
    buffer_nbytes = 0
    if streamed and (needs_pinned_memory() or config.slots == "copied"):
        buffer_nbytes = max(plan.tables[0].expert_nbytes for plan in streamed)
    refuse_excess(trunk_nbytes, max(slots_nbytes, ram_budget) + _BUFFERED_EXPERTS * buffer_nbytes)
    value_nbytes = itemsize(model)
    chunk_memory = _chunk_memory(model, checkpoint, switches, top_k, value_nbytes)
    prefill_tokens = chunk_memory.most_tokens(available_memory() - trunk_nbytes - slots_nbytes)

    limit_cache()
    counters = Counters()
    pools = _build_pools(streamed, checkpoint, config, counters, buffer_nbytes)
    sync = RouterSync(counters, make_readback(backend) if streamed else None)
    blocks = _blocks(model, switches)
    # Routers and shared experts must read what the experts read; some blocks project the experts' input.
    width = hidden_size(checkpoint.config)
    plain = {path: block for path, block in blocks.items() if output_width(switches[path]) == width}
    lookaheads = _lookaheads(tables, pools, blocks, plain, top_k) if config.lookahead and top_k else {}
    target_slots = _memory_pressure(streamed, pools, top_k)
    replacements: list[tuple[str, nn.Module]] = []
    for table in tables:
        path, switch = table.layer, switches[table.layer]
        if path not in pools:
            replacements.append((path, ResidentSwitchGLU(switch, backend)))
            continue
        layer = StreamedSwitchGLU(
            switch,
            table,
            pools[path],
            sync,
            backend,
            start_shared=_start_of_shared_expert(plain.get(path)),
            lookahead=lookaheads.get(path),
            target_slots=target_slots.get(path),
        )
        replacements.append((path, layer))
    model.update_modules(tree_unflatten(replacements))
    if config.warm_start is not None:
        load_residents(config.warm_start, {t.layer: (t, pools[t.layer]) for t in tables if t.layer in pools})
    kv_layers = growing_layers(model)
    return Streaming(
        counters=counters,
        experts_per_token=top_k,
        native_experts_per_token=native_top_k,
        trunk_nbytes=trunk_nbytes,
        slots_nbytes=slots_nbytes,
        experts_nbytes=experts_nbytes(tables),
        pools=tuple(dict.fromkeys(pools.values())),
        prefill_step_size=prefill_tokens,
        chunk_memory=chunk_memory,
        itemsize=value_nbytes,
        kv_token_nbytes=kv_token_nbytes(checkpoint.config, kv_layers, value_nbytes),
        kv_layers=kv_layers,
        kernels=config.kernels,
    )


def _build_pools(
    plans: Sequence[PoolPlan], checkpoint: Checkpoint, config: Config, counters: Counters, buffer_nbytes: int
) -> dict[str, Pool]:
    """Return the pool of each streamed layer, by the layer's path."""
    keep_warm = make_keep_warm(config.keep_warm)
    reader = Reader(checkpoint.files, config.read_threads, counters, config.read_timeout, keep_warm)
    tables = [table for plan in plans for table in plan.tables]
    check = None
    if config.manifest is not None:
        check = ManifestCheck(Manifest.load(Path(config.manifest), checkpoint), tables)
    buffers = None
    if buffer_nbytes:
        buffers = (PinnedBuffers if needs_pinned_memory() else BounceBuffers)(buffer_nbytes, _BUFFERED_EXPERTS)
    pools = {}
    for plan in plans:
        pool = Pool(plan.slots, plan.tables[0], reader, counters, buffers, check)
        pools.update({table.layer: pool for table in plan.tables})
    return pools


def _chunk_memory(
    model: nn.Module, checkpoint: Checkpoint, switches: Mapping[str, nn.Module], top_k: int, value_nbytes: int
) -> ChunkMemory:
    down = next(switch.down_proj if isinstance(switch, SwitchGLU) else switch.fc2 for switch in switches.values())
    return ChunkMemory.from_config(
        checkpoint.config,
        top_k=top_k,
        hidden=down.output_dims,
        intermediate=down.input_dims,
        itemsize=value_nbytes,
        # gpt-oss names them sinks, MiMo attention_sink_bias.
        sinks=any("sink" in name for name, _ in tree_flatten(model.parameters())),
    )


def _memory_pressure(
    plans: Sequence[PoolPlan], pools: Mapping[str, Pool], top_k: int
) -> dict[str, Callable[[Pool], int]]:
    """Return what tells the layers with a pool of their own how many slots to keep."""
    # The memory of an NVIDIA GPU is not the host's.
    if needs_pinned_memory():
        return {}
    own = [plan.tables[0].layer for plan in plans if len(plan.tables) == 1]
    pressure = MemoryPressure([pools[path] for path in own], max(1, top_k))
    return dict.fromkeys(own, pressure.slots)


def _blocks(model: nn.Module, switches: Iterable[str]) -> dict[str, nn.Module]:
    """Return the MoE block around each switch layer, by the layer's path."""
    modules = dict(model.named_modules())
    return {path: modules[path.rpartition(".")[0]] for path in switches}


def _lookaheads(
    tables: Sequence[ExpertTable],
    pools: Mapping[str, Pool],
    blocks: Mapping[str, nn.Module],
    plain: Mapping[str, nn.Module],
    top_k: int,
) -> dict[str, Lookahead]:
    """Return the lookahead of each streamed layer whose next is streamed and has a router module."""
    lookaheads = {}
    for table, following in pairwise(tables):
        next_router = router(blocks[following.layer])
        if table.layer in pools and table.layer in plain and following.layer in pools and next_router is not None:
            lookaheads[table.layer] = Lookahead(next_router, top_k, following, pools[following.layer])
    return lookaheads


def _start_of_shared_expert(block: nn.Module | None) -> Callable[[mx.array], mx.array | None] | None:
    shared = None if block is None else shared_expert(block)
    return None if shared is None else overlap(shared).start


def _nbytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for _, parameter in tree_flatten(module.parameters()))
