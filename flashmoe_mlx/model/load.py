"""load(): an mlx-lm model whose experts stay on disk."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters, load_model, load_tokenizer

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.checkpoint.manifest import FirstReads, Manifest
from flashmoe_mlx.config import Config
from flashmoe_mlx.layers.lookahead import Lookahead
from flashmoe_mlx.layers.native_cpu import to_float32, use_native
from flashmoe_mlx.layers.qwen3_next import FewLaunches, swap_trunk
from flashmoe_mlx.layers.readback import Mailbox
from flashmoe_mlx.layers.shared_expert import make_early
from flashmoe_mlx.layers.switch import Fence, ResidentSwitchGLU, StreamedSwitchGLU
from flashmoe_mlx.model.budget import (
    experts_nbytes,
    free_memory,
    growing_layers,
    kv_token_nbytes,
    plan,
    prefill_step_size,
    prefill_token_nbytes,
    quantized_share,
    refuse_context,
    refuse_excess,
    spare_memory,
)
from flashmoe_mlx.ops import native
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.memory_pressure import Pressure, limit_cache
from flashmoe_mlx.streaming.pinned_memory import Staging, needs_staging
from flashmoe_mlx.streaming.pool import Pool, slot_nbytes
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.streaming.warm_start import load_residents, save_residents
from flashmoe_mlx.system.huge_pages import use_large_pages

# What the families call the number of routed experts a token uses.
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)

# What their blocks call the parts next to a switch layer that can be computed or asked before it.
_SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
_ROUTERS = ("gate", "router")
_STAGED_EXPERTS = 32  # a token's, twice: those it needs, and those read ahead


@dataclass(frozen=True)
class Streaming:
    """What :func:`load` set up, found at ``model.streaming``.

    Args:
        counters (Counters): hits, misses, bytes and seconds so far.
        experts_per_token (int): routed experts a token uses.
        native_experts_per_token (int): how many the checkpoint asks for.
        trunk_nbytes (int): bytes of memory for everything but routed experts.
        slots_nbytes (int): bytes of memory for routed experts.
        experts_nbytes (int): bytes that all routed experts would take.
        pools (tuple[Pool, ...]): the slots of the layers that are not all in memory.
        prefill_step_size (int): tokens of a prompt to process at a time with the memory that was free. The commands
            use it; from Python pass it on, e.g. to ``mlx_lm.generate(...,
            prefill_step_size=model.streaming.prefill_step_size)``, because mlx-lm's own default is always 2048.
        itemsize (int): bytes of a value as the model computes it.
        kv_token_nbytes (int): bytes that each token of a context needs in the KV cache.
    """

    counters: Counters
    experts_per_token: int
    native_experts_per_token: int
    trunk_nbytes: int
    slots_nbytes: int
    experts_nbytes: int
    pools: tuple[Pool, ...]
    prefill_step_size: int
    itemsize: int
    kv_token_nbytes: int

    def save_residents(self, path: str | Path) -> None:
        """Write which experts are in memory, for a ``warm_start`` of the next run.

        Raises:
            OSError: the file cannot be written.
        """
        save_residents(path, self.pools)

    def refuse_context(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> None:
        """Refuse a context that memory cannot hold, as the commands do before they begin.

        Args:
            tokens (int): of prompt and answer.
            kv_bits (int, optional): of a quantised KV cache. Default: ``None``, it is not.
            kv_group_size (int): values of a quantised KV cache that share a scale and a bias. Default: ``64``.

        Raises:
            MemoryError: the KV cache of so many tokens does not fit into free memory.
        """
        token_nbytes: float = self.kv_token_nbytes
        if kv_bits is not None:
            token_nbytes *= quantized_share(kv_bits, kv_group_size, self.itemsize)
        refuse_context(tokens, token_nbytes)

    def memory(self) -> str:
        """One line for people about memory, e.g. ``18.0 GB of 217.4 GB of experts in memory, 5.5 GB of trunk``."""
        slots, experts, trunk = (n / 1e9 for n in (self.slots_nbytes, self.experts_nbytes, self.trunk_nbytes))
        return f"{slots:.1f} GB of {experts:.1f} GB of experts in memory, {trunk:.1f} GB of trunk"

    def summary(self) -> str:
        """The ``Experts:`` line."""
        all_resident = self.slots_nbytes == self.experts_nbytes
        line = f"Experts: {'all in memory' if all_resident else self.counters.summary()}"
        if given_back := sum((pool.planned - pool.slots) * pool.slot_nbytes for pool in self.pools):
            line += f", {given_back / 1e9:.2f} GB given back because memory ran short"
        if self.experts_per_token != self.native_experts_per_token:
            line += f", {self.experts_per_token} experts per token instead of {self.native_experts_per_token}"
        return line


def load(
    path_or_hf_repo: str,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    *,
    ram_budget: int | str | None = None,
    experts_per_token: int | None = None,
    config: str | Path | Config | None = None,
) -> tuple[nn.Module, TokenizerWrapper] | tuple[nn.Module, TokenizerWrapper, dict[str, Any]]:
    """Load a Mixture-of-Experts model and its tokenizer; the routed experts stay in the checkpoint's files.

    The model is mlx-lm's own, so all of mlx-lm works on it, on one thread at a time. On a CPU it computes in float32,
    because MLX's CPU kernels are slow and inaccurate in half precision. Counters and sizes are at ``model.streaming``.

    An expert that cannot be read ends the call with a ReadError, and the next call works. Layers with a part of their
    experts in memory give slots back while the machine's memory runs short. MLX's cache limit is lowered to a 32nd of
    all memory.

    Args:
        path_or_hf_repo (str): a folder, or a repository of the Hugging Face hub.
        tokenizer_config (dict, optional): extra settings for the tokenizer. Default: ``None``.
        model_config (dict, optional): entries that replace those of config.json. Default: ``None``.
        adapter_path (str, optional): LoRA adapters for the trunk. Default: ``None``.
        lazy (bool): leave the trunk on disk too until it is used. Default: ``False``.
        return_config (bool): return the model's config as the third item. Default: ``False``.
        revision (str, optional): branch, tag or commit of the repository. Default: ``None``.
        trust_remote_code (bool): run Python code that comes with the model. Default: ``False``.
        ram_budget (int or str, optional): memory for experts, in bytes or as ``"12GB"``; 0 keeps one small pool and
            leaves the rest to the OS page cache; ``"auto"`` takes what the machine can spare. The output does not
            depend on it. Default: the config's, or 0.
        experts_per_token (int, optional): routed experts a token uses. Fewer than the checkpoint's own number read
            less and change the output. Default: the config's, or the checkpoint's.
        config (str, Path or Config, optional): a preset of the model's family (``"exact"``, ``"flash"``), a TOML file,
            or the settings themselves; the two arguments above override it. Default: ``None``.

    Returns:
        tuple: (model, tokenizer), or (model, tokenizer, config).

    Raises:
        FileNotFoundError: the folder, its config.json or one of its shards is missing.
        ValueError: not a Mixture-of-Experts model, a damaged checkpoint, an unknown or impossible setting.
        MemoryError: trunk and budget do not fit into free memory.
        OSError: the repository could not be downloaded, or a file not read.
    """
    checkpoint = Checkpoint(find_folder(path_or_hf_repo, revision), trust_remote_code)
    if not isinstance(config, Config):
        config = Config() if config is None else Config.load(config, checkpoint.config["model_type"])
    config = config.override(ram_budget=ram_budget, experts_per_token=experts_per_token)
    model_config = model_config or {}
    native_top_k, change = _top_k(checkpoint.config | model_config, config.experts_per_token)
    asked = f" with experts_per_token {config.experts_per_token}" if change else ""
    model, loaded_config = load_lazily(checkpoint, model_config | change, trust_remote_code, asked)
    model.streaming = _stream_experts(model, checkpoint, config, native_top_k)
    if not lazy:
        for _, parameter in tree_flatten(model.parameters()):
            mx.eval(parameter)  # one at a time, so that converting them needs no room for two trunks
            use_large_pages(parameter)
    if adapter_path is not None:
        model = load_adapters(model, adapter_path)
        model.eval()
    if not lazy and (mx.default_device().type == mx.gpu or native.kernels() is not None):
        swap_trunk(model)
    _start_early(model, _hidden(loaded_config))
    # Said either way: where it is not, transformers asks whoever sits at the terminal.
    tokenizer_config = {"trust_remote_code": trust_remote_code} | (tokenizer_config or {})
    tokenizer = load_tokenizer(checkpoint.folder, tokenizer_config, eos_token_ids=loaded_config.get("eos_token_id"))
    return (model, tokenizer, loaded_config) if return_config else (model, tokenizer)


def load_lazily(
    checkpoint: Checkpoint, model_config: dict[str, Any], trust_remote_code: bool, asked: str = ""
) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of a checkpoint, of which nothing is read yet, and its config.

    Raises:
        ValueError: mlx-lm cannot build it. ``asked`` tells what it was asked besides.
    """
    try:
        model, config = load_model(
            checkpoint.folder, lazy=True, model_config=model_config, trust_remote_code=trust_remote_code
        )
    except (AssertionError, KeyError, TypeError) as error:  # how mlx-lm's families refuse a setting
        raise ValueError(f"mlx-lm cannot build {checkpoint.folder} from its config.json{asked}: {error}") from error
    return model, config


def switch_layers(model: nn.Module) -> dict[str, nn.Module]:
    """mlx-lm's switch layers of a model by their paths, in order."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, (SwitchGLU, SwitchMLP)))
    return dict(sorted(found, key=lambda pair: [int(number) for number in re.findall(r"\d+", pair[0])]))


def find_experts(model: nn.Module, checkpoint: Checkpoint) -> tuple[dict[str, nn.Module], list[ExpertTable]]:
    """The switch layers of a lazily loaded model by their paths, in order, and where the experts of each lie.

    Raises:
        ValueError: there are none, or their bytes cannot be used as they are.
    """
    switches = switch_layers(model)
    if not switches:
        raise ValueError(
            f"{checkpoint.folder} is a {checkpoint.config['model_type']} without routed experts: there is nothing to "
            "stream. Run it with mlx_lm.generate"
        )
    tables = [
        ExpertTable.build(checkpoint, path, dict(tree_flatten(switch.parameters())))
        for path, switch in switches.items()
    ]
    return switches, tables


def _top_k(config: Mapping[str, Any], wanted: int | None) -> tuple[int, dict[str, Any]]:
    """The checkpoint's own number of experts per token, and the config entries that make it ``wanted``."""
    text_config = config.get("text_config") or {}
    outer = [key for key in _TOP_K_KEYS if isinstance(config.get(key), int)]
    inner = [key for key in _TOP_K_KEYS if isinstance(text_config.get(key), int)]
    native = text_config[inner[0]] if inner else config[outer[0]] if outer else 0
    if wanted is None:
        return native, {}
    if not native:
        raise ValueError(
            f"config.json of this {config['model_type']} does not say how many experts a token uses: "
            "experts_per_token cannot change it"
        )
    change: dict[str, Any] = dict.fromkeys(outer, wanted)
    if inner:
        change["text_config"] = text_config | dict.fromkeys(inner, wanted)
    return native, change


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
    place_nbytes = max((slot_nbytes(share.tables[0]) for share in streamed), default=0) if needs_staging() else 0
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
    first_reads = None
    if config.manifest is not None:
        first_reads = FirstReads(Manifest.load(Path(config.manifest), checkpoint), tables)
    staging = Staging(place_nbytes, _STAGED_EXPERTS) if place_nbytes else None
    fence = Fence(counters, Mailbox() if place_nbytes else None)
    replaced: list[tuple[str, nn.Module]] = []
    places: dict[str, tuple[ExpertTable, Pool]] = {}
    for share in shares:
        if share.all_resident:
            replaced.extend((table.layer, ResidentSwitchGLU(switches[table.layer])) for table in share.tables)
            continue
        pool = Pool(share.slots, share.tables[0], reader, counters, staging, first_reads)
        places |= {table.layer: (table, pool) for table in share.tables}
    layers = {
        table.layer: StreamedSwitchGLU(switches[table.layer], table, pool, fence) for table, pool in places.values()
    }
    if config.lookahead and top_k:
        ordered = {table.layer: places.get(table.layer) for table in tables}
        _look_ahead(model, layers, ordered, top_k, _hidden(checkpoint.config))
    if not needs_staging():  # where the GPU shares the memory of the host
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


def _hidden(config: Mapping[str, Any]) -> int | None:
    """Width of the model, which the input of shared experts and routers has."""
    return (config.get("text_config") or config).get("hidden_size")


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


def _itemsize(module: nn.Module) -> int:
    """Bytes of a value as it is computed: on a CPU float32's, elsewhere those of the largest parameter of floats."""
    if mx.default_device().type == mx.cpu:
        return mx.float32.size
    floats = [array for _, array in tree_flatten(module.parameters()) if mx.issubdtype(array.dtype, mx.floating)]
    return int(max(floats, key=lambda array: array.size).itemsize)
