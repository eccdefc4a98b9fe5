"""Time per layer of a decoded token in the trunk of Qwen3.5, with mlx-lm's code and with fused decoder layers.

    python -m benchmarks.trunk
    python -m benchmarks.trunk --dims small                 # on a CPU
    python -m benchmarks.trunk --references route combine   # without these kernels: the gain of each
    python -m benchmarks.trunk --streamed                   # a whole model that streams, every expert a hit

Random layers of the 397B model's size with 64 experts each decode token after token, as generation does: the host is
one token ahead. The ways take turns, and figures are medians. Each is timed without and with a read-back of the
router's choice in every layer, which streaming needs: mlx-lm's layers read it before they call their experts, ours
are those that stream, with every expert in a slot. A launch is an operation of the graph that is not a view; experts
are not counted. With more than 1,024 positions MLX's attention launches twice.

What is predicted is the time of a layer's bytes at the rate of a copy, and ``measured_over_predicted`` is the ratio of
speeds. The last line is JSON.
"""

import argparse
import copy
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache, KVCache

from benchmarks.checkpoints import write_checkpoint
from benchmarks.decode import seconds_per_token
from benchmarks.exact import load_resident
from benchmarks.kernels import copy_bandwidth
from benchmarks.models import load_all_hits
from benchmarks.record import record
from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint
from flashmoe_mlx.layers.qwen3_next import fuse_decoder_layers
from flashmoe_mlx.layers.readback import make_readback
from flashmoe_mlx.layers.router_sync import RouterSync
from flashmoe_mlx.layers.switch import ResidentSwitchGLU, StreamedSwitchGLU
from flashmoe_mlx.model.families import find_experts
from flashmoe_mlx.ops.attention import decode_attention, norm_rope
from flashmoe_mlx.ops.dispatch import Backend, Operation, choose_backend
from flashmoe_mlx.ops.gated_delta import gated_delta
from flashmoe_mlx.ops.norm import add_norm, combine
from flashmoe_mlx.ops.products import linear
from flashmoe_mlx.ops.routing import route, router_and_shared
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers, needs_pinned_memory
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.reader import Reader

DIMS = {
    "397b": {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "num_experts": 64,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024,
    },
    "small": {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
    },
}
ROPE = {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"}
# The first layer of each kind.
KINDS = {"GatedDeltaNet": 0, "attention": 3}
# Tokens before those of a turn.
UNTIMED = 8

VIEWS = {"Slice", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Broadcast", "Split", "Flatten", "Unflatten"}
# The last copies nothing here.
VIEWS |= {"View", "StopGradient", "Contiguous"}

OPERATIONS: dict[str, Operation[..., Any]] = {
    operation.__name__: operation
    for operation in (
        *(linear, router_and_shared, route, add_norm, combine),
        *(gated_delta, norm_rope, decode_attention),
    )
}


class ReadBack(nn.Module):
    """A switch layer whose experts the host must know before it calls it."""

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.switch = switch

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        indices.tolist()
        y: mx.array = self.switch(x, indices)
        mx.async_eval(y)  # type: ignore[no-untyped-call]
        return y


class NoExperts(nn.Module):
    """A switch layer that launches nothing."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.broadcast_to(x[..., None, :], (*indices.shape, x.shape[-1]))


def random_layer(args: qwen3_5.TextModelArgs, index: int, dtype: mx.Dtype) -> nn.Module:
    """Return a decoder layer in 4 bits, its router in 8."""
    layer = qwen3_5.DecoderLayer(args, index)
    if layer.is_linear:
        a_log = layer.linear_attn.A_log
    layer.set_dtype(dtype)
    if layer.is_linear:
        # It stays in float32.
        layer.linear_attn.A_log = a_log

    def bits(path: str, module: nn.Module) -> bool | dict[str, int]:
        router = path in ("mlp.gate", "mlp.shared_expert_gate")
        return {"group_size": 64, "bits": 8} if router else hasattr(module, "to_quantized")

    nn.quantize(layer, 64, 4, class_predicate=bits)
    layer.eval()
    mx.eval(layer.parameters())
    return layer


class Stack(nn.Module):
    """Layers that follow each other, as a model has them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = layers


def ways(theirs: list[nn.Module], backend: Backend) -> dict[str, list[nn.Module]]:
    """Return the layers as mlx-lm computes them, and fused. They share their arrays."""
    ours = [copy.deepcopy(layer) for layer in theirs]
    for layer in ours:
        layer.mlp.switch_mlp = ResidentSwitchGLU(layer.mlp.switch_mlp, backend)
    if fuse_decoder_layers(Stack(ours), backend) != len(ours):
        raise SystemExit("a layer was not fused, so there is nothing to compare: choose a backend with kernels")
    for their, our in zip(theirs, ours, strict=True):
        for name in ("linear_attn", "self_attn"):
            if name in their:
                their[name].update(our[name].parameters())
    return {"mlx-lm": theirs, "fused": ours}


def read_back(both: dict[str, list[nn.Module]], folder: Path, backend: Backend) -> dict[str, list[nn.Module]]:
    """Return switch layers for both ways that read the router's choice back to the host."""
    switches = [layer.mlp.switch_mlp for layer in both["mlx-lm"]]
    return {
        "mlx-lm": [ReadBack(switch) for switch in switches],
        "fused": streamed_switches(both["mlx-lm"], folder, backend),
    }


def streamed_switches(layers: list[nn.Module], folder: Path, backend: Backend) -> list[nn.Module]:
    """Write the experts of layers to a checkpoint, and return switch layers that stream them, all of them in slots."""
    stack = Stack(layers)
    experts = {name: array for name, array in tree_flatten(stack.parameters()) if "switch_mlp" in name}
    mx.save_safetensors(str(folder / "model.safetensors"), experts)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_5_moe"}))
    checkpoint, counters = Checkpoint(folder), Counters()
    switches, tables = find_experts(stack, checkpoint, backend)
    reader = Reader(checkpoint.files, 8, counters)
    pinned = PinnedBuffers(tables[0].expert_nbytes, 10) if needs_pinned_memory() else None
    sync = RouterSync(counters, make_readback(backend))

    def streamed_switch(table: ExpertTable) -> StreamedSwitchGLU:
        pool = Pool(table.experts, table, reader, counters, pinned)
        pool.load(table, range(table.experts))
        return StreamedSwitchGLU(copy.deepcopy(switches[table.layer]), table, pool, sync, backend)

    return [streamed_switch(table) for table in tables]


def cache_of(layer: nn.Module, context: int, dtype: mx.Dtype) -> ArraysCache | KVCache:
    """Return a random state of a layer after a context of that many tokens."""
    if layer.is_linear:
        mixer, cache = layer.linear_attn, ArraysCache(2)
        cache[0] = mx.random.normal((1, mixer.conv_kernel_size - 1, mixer.conv_dim)).astype(dtype)
        cache[1] = mx.random.normal((1, mixer.num_v_heads, mixer.head_v_dim, mixer.head_k_dim)) * 0.1
    else:
        mixer, cache = layer.self_attn, KVCache()
        shape = (1, mixer.num_key_value_heads, context, mixer.head_dim)
        cache.update_and_fetch(mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype))
    mx.eval(cache.state[0], cache.state[1] if isinstance(cache, KVCache) else [])
    return cache


def forward(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array) -> mx.array:
    for layer, cache in zip(layers, caches, strict=True):
        x = layer(x, None, cache)
    return mx.fast.rms_norm(x, None, 1e-6)


def seconds_per_layer(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array, tokens: int) -> float:
    """Decode, and return seconds per token and layer; the first tokens, which allocate MLX's buffers, do not count."""
    for _ in range(UNTIMED):
        x = forward(layers, caches, x)
        mx.eval(x)
    begin = time.perf_counter()
    for _ in range(tokens):
        following = forward(layers, caches, x)
        mx.async_eval(following)  # type: ignore[no-untyped-call]
        mx.eval(x)
        x = following
    mx.eval(x)
    return (time.perf_counter() - begin) / tokens / len(layers)


def host_seconds(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array) -> float:
    """Return the seconds in which Python builds the graph of a layer."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x = forward(layers, caches, x)
        times.append((time.perf_counter() - begin) / len(layers))
        mx.eval(x)
    return median(times)


def launches(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array) -> int:
    """Return the number of operations in a layer's graph that are not views, without its experts."""
    # A layer's input comes from another layer.
    x = layers[0](x, None, caches[0])
    mx.eval(x)
    layer, cache = layers[1], caches[1]
    switch, layer.mlp.switch_mlp = layer.mlp.switch_mlp, NoExperts()
    y = layer(x, None, cache)
    layer.mlp.switch_mlp = switch
    graph = io.StringIO()
    state = cache.cache if isinstance(cache, ArraysCache) else [cache.keys, cache.values]
    mx.export_to_dot(graph, y, *state)
    return sum(name not in VIEWS for name in re.findall(r'\[label ="(\w+)", shape=rectangle\]', graph.getvalue()))


def layer_nbytes(layer: nn.Module, cache: Any) -> int:
    """Return the bytes that a token moves: the trunk, its experts, and the layer's state."""
    switch = sum(array.nbytes for _, array in tree_flatten(layer.mlp.switch_mlp.parameters()))
    trunk = sum(array.nbytes for _, array in tree_flatten(layer.parameters())) - switch
    read = cache.cache if isinstance(cache, ArraysCache) else cache.keys_and_values()
    # That of a GatedDeltaNet is written, too.
    state = sum(part.nbytes for part in read) * (2 if layer.is_linear else 1)
    nbytes: int = trunk + switch * layer.mlp.top_k // layer.mlp.num_experts + state
    return nbytes


def measure(
    kind: str,
    both: dict[str, list[nn.Module]],
    asking: dict[str, list[nn.Module]],
    context: int,
    args: argparse.Namespace,
    dtype: mx.Dtype,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """Return the figures of each way for one kind of layer at one context."""
    x = mx.random.normal((1, 1, both["mlx-lm"][0].input_layernorm.weight.size)).astype(dtype)

    def fresh(layers: Sequence[nn.Module]) -> list[Any]:
        return [cache_of(layer, max(1, context - args.tokens - UNTIMED), dtype) for layer in layers]

    times: dict[str, list[list[float]]] = {way: [] for way in both}
    for turn in range(args.turns + 1):
        for way, layers in both.items():
            figures = [seconds_per_layer(layers, fresh(layers), x, args.tokens)]
            switches = [layer.mlp.switch_mlp for layer in layers]
            for layer, switch in zip(layers, asking[way], strict=True):
                layer.mlp.switch_mlp = switch
            figures.append(seconds_per_layer(layers, fresh(layers), x, args.tokens))
            for layer, switch in zip(layers, switches, strict=True):
                layer.mlp.switch_mlp = switch
            # The first turn warms up.
            if turn:
                times[way].append(figures)
    lines: list[dict[str, Any]] = []
    for way, layers in both.items():
        nbytes = layer_nbytes(layers[0], fresh(layers[:1])[0])
        alone, read_back = (median(each) for each in zip(*times[way], strict=True))
        line = {
            "kind": kind,
            "context": context,
            "way": way,
            "without": " ".join(args.references),
            "launches": launches(layers, fresh(layers[:2]), x),
            "mb": round(nbytes / 1e6, 1),
            "host_us": round(1e6 * host_seconds(layers, fresh(layers), x), 1),
            "us": round(1e6 * alone, 1),
            "read_back_us": round(1e6 * read_back, 1),
        }
        theirs = lines[0] if lines else line
        line |= {
            "ratio": round(line["us"] / theirs["us"], 3),
            "read_back_ratio": round(line["read_back_us"] / theirs["read_back_us"], 3),
            "predicted_us": round(1e6 * nbytes / bandwidth, 1),
            "measured_over_predicted": round(nbytes / bandwidth / alone, 3),
        }
        lines.append(line)
        print(
            f"{kind}, context {context}, {way}: {line['launches']} launches, {line['host_us']} us to build the graph, "
            f"{line['us']} us a layer ({line['ratio']} of mlx-lm's), predicted {line['predicted_us']}, measured / "
            f"predicted speed {line['measured_over_predicted']:.2f}; {line['read_back_us']} us with read-back "
            f"({line['read_back_ratio']})",
            flush=True,
        )
    return lines


def difference(both: dict[str, list[nn.Module]], context: int, dtype: mx.Dtype) -> float:
    """Return the distance of the two ways' outputs after one layer, relative to their size."""
    layers = [layers[0] for layers in both.values()]
    cache = cache_of(layers[0], context, dtype)
    x = mx.random.normal((1, 1, layers[0].input_layernorm.weight.size)).astype(dtype)
    theirs, ours = (layer(x, None, copy.deepcopy(cache)).astype(mx.float32) - x for layer in layers)
    return float(mx.linalg.norm(theirs - ours) / mx.linalg.norm(theirs))


def model_config(dims: dict[str, int], layers: int) -> dict[str, Any]:
    """Return the config.json of a Qwen3.5-MoE of these dimensions, with a small vocabulary."""
    text = dims | {"model_type": "qwen3_5_moe_text", "num_hidden_layers": layers, "vocab_size": 2048}
    text |= {"rope_parameters": ROPE, "full_attention_interval": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return {"model_type": "qwen3_5_moe", "text_config": text, "vocab_size": 2048}


def streamed(dims: dict[str, int], turns: int, layers: int, dtype: mx.Dtype) -> dict[str, Any]:
    """Return the figures of a whole model: mlx-lm's in memory, and ours, which streams with every expert a hit."""
    prompt = list(range(2, 66))
    with tempfile.TemporaryDirectory() as name:
        quantization = {"group_size": 64, "bits": 4}
        write_checkpoint(Path(name), model_config(dims, layers), quantization=quantization, dtype=dtype)
        print("checkpoint written", flush=True)
        resident = load_resident(name)
        ours = load_all_hits(name)
        models = [seconds_per_token(model, prompt, 16, lambda: None) for model in (resident, ours)]
        # Warm up.
        for model in models * 2:
            next(model)
        counters = ours.streaming.counters
        misses = counters.misses
        pairs = []
        for turn in range(turns):
            pairs.append([next(model) for model in models])
            print(f"turn {turn}: {[round(1e3 * s / layers, 3) for s in pairs[-1]]} ms a layer", flush=True)
        misses = counters.misses - misses
    theirs, our = (median(each) for each in zip(*pairs, strict=True))
    return {
        "layers": layers,
        "mlx_lm_tps": round(1 / theirs, 1),
        "streamed_tps": round(1 / our, 1),
        "ratio": round(median(a / b for a, b in pairs), 3),
        "misses_per_token": round(misses / turns / 16, 2),
    }


@contextmanager
def references(names: Sequence[str]) -> Iterator[None]:
    """Let operations run as references, without their kernels, in layers that are made meanwhile."""
    left_out = [OPERATIONS[name] for name in names]
    on = Operation.on

    def chosen(operation: Operation[..., Any], backend: Backend) -> Callable[..., Any]:
        return operation.reference if operation in left_out else on(operation, backend)

    with mock.patch.object(Operation, "on", chosen):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=DIMS, default="397b", help="sizes of the layers (default: 397b)")
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--contexts", type=int, nargs="+", default=[128, 4096, 32768], help="positions (default: 128 4096 32768)"
    )
    parser.add_argument(
        "--kinds", choices=KINDS, nargs="+", default=list(KINDS), help="kinds of layers (default: both)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="tokens per turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each way (default: %(default)s)")
    parser.add_argument(
        "--references", nargs="+", default=[], choices=OPERATIONS, metavar="OPERATION", help="run these without kernels"
    )
    parser.add_argument("--streamed", action="store_true", help="decode a whole model that streams")
    parser.add_argument(
        "--record", action="store_true", help="append the figures to results/trunk.csv or trunk_streamed.csv"
    )
    args = parser.parse_args()
    mx.random.seed(0)
    dtype = mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32
    with references(args.references):
        if args.streamed:
            figures = streamed(DIMS[args.dims], args.turns, args.layers, dtype)
            if args.record:
                record("trunk_streamed", {"dims": args.dims} | figures)
            print(json.dumps(figures))
            return
        compare(args, dtype)


def compare(args: argparse.Namespace, dtype: mx.Dtype) -> None:
    """Measure, print and record single layers."""
    backend, bandwidth = choose_backend(), copy_bandwidth(2**26)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    text = DIMS[args.dims] | {"rope_parameters": ROPE, "rms_norm_eps": 1e-6}
    lines: list[dict[str, Any]] = []
    for kind in args.kinds:
        model_args = qwen3_5.TextModelArgs.from_dict(text)
        begin = time.perf_counter()
        both = ways([random_layer(model_args, KINDS[kind], dtype) for _ in range(args.layers)], backend)
        print(f"{kind}: {args.layers} layers in {time.perf_counter() - begin:.1f} s", flush=True)
        print(f"{kind}: outputs differ by {difference(both, 128, dtype):.1e}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            asking = read_back(both, Path(name), backend)
        print(f"{kind}: experts in slots after {time.perf_counter() - begin:.1f} s", flush=True)
        # The state of a GatedDeltaNet has one size.
        for context in args.contexts if kind == "attention" else args.contexts[:1]:
            lines += measure(kind, both, asking, context, args, dtype, bandwidth)
        del both, asking
        mx.clear_cache()
    if args.record:
        for line in lines:
            record("trunk", {"dims": args.dims} | line | {"copy_tb_per_s": round(bandwidth / 1e12, 3)})
    print(json.dumps({"copy_tb_per_s": round(bandwidth / 1e12, 3), "lines": lines}))


if __name__ == "__main__":
    main()
