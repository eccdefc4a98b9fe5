"""Where a decoded token's time goes in the layers of Qwen3.5, with mlx-lm's code and in few launches.

    python -m benchmarks.trunk
    python -m benchmarks.trunk --dims small          # on a CPU, where it only shows that it runs
    python -m benchmarks.trunk --twins route combine # without these kernels: what each of them brings
    python -m benchmarks.trunk --streamed            # a whole model, its experts streamed and all of them hits

Random layers of the 397B model's size with 64 experts each decode token after token, as generation does: the host is
one token ahead. The ways take turns, and figures are medians. Each is timed without and with a read-back of the
router's choice in every layer, which streaming needs: mlx-lm's layers read it before they call their experts, ours
are those that stream, with every expert in a slot. What counts as a launch is an operation of the graph that is no
view; experts are not counted. With more than 1,024 positions MLX's attention launches twice. The last line is JSON.
"""

import argparse
import copy
import io
import json
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from mlx_lm.models.cache import ArraysCache, KVCache

import flashmoe_mlx
from benchmarks.checkpoints import write_checkpoint
from benchmarks.decode import seconds_per_token
from benchmarks.exact import load_resident
from benchmarks.kernels import copy_bandwidth
from benchmarks.record import record
from flashmoe_mlx.checkpoint.expert_table import ExpertPart, ExpertTable
from flashmoe_mlx.checkpoint.span import Span
from flashmoe_mlx.layers.fence import Fence
from flashmoe_mlx.layers.qwen3_next import swap_trunk
from flashmoe_mlx.layers.readback import Mailbox
from flashmoe_mlx.layers.switch import ResidentSwitchGLU, StreamedSwitchGLU
from flashmoe_mlx.model import budget
from flashmoe_mlx.ops import gated_delta as trunk_ops
from flashmoe_mlx.ops import products as ops
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
KINDS = {"GatedDeltaNet": 0, "attention": 3}  # the first layer of each
UNTIMED = 8  # tokens before each turn's

VIEWS = {"Slice", "Reshape", "Transpose", "ExpandDims", "Squeeze", "Broadcast", "Split", "Flatten", "Unflatten"}
VIEWS |= {"View", "StopGradient", "Contiguous"}  # the last copies nothing here


class ReadBack(nn.Module):
    """A switch layer whose experts the host must know before it calls it."""

    def __init__(self, switch: nn.Module):
        super().__init__()
        self.switch = switch

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        indices.tolist()
        y = self.switch(x, indices)
        mx.async_eval(y)
        return y


class NoExperts(nn.Module):
    """A switch layer that launches nothing."""

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        return mx.broadcast_to(x[..., None, :], (*indices.shape, x.shape[-1]))


def random_layer(args: qwen3_5.TextModelArgs, index: int, dtype: mx.Dtype) -> nn.Module:
    """A decoder layer in 4 bits, its router in 8."""
    layer = qwen3_5.DecoderLayer(args, index)
    if layer.is_linear:
        a_log = layer.linear_attn.A_log
    layer.set_dtype(dtype)
    if layer.is_linear:
        layer.linear_attn.A_log = a_log  # stays in float32

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


def ways(theirs: list[nn.Module]) -> dict[str, list[nn.Module]]:
    """The same layers as mlx-lm computes them, and in few launches; they share their arrays."""
    ours = [copy.deepcopy(layer) for layer in theirs]
    for layer in ours:
        layer.mlp.switch_mlp = ResidentSwitchGLU(layer.mlp.switch_mlp)
    if swap_trunk(Stack(ours)) != len(ours):
        raise SystemExit("a layer was not swapped: there is nothing to compare")
    for their, our in zip(theirs, ours, strict=True):
        for name in ("linear_attn", "self_attn"):
            if name in their:
                their[name].update(our[name].parameters())
    return {"mlx-lm": theirs, "few launches": ours}


def read_back(both: dict[str, list[nn.Module]], folder: Path) -> dict[str, list[nn.Module]]:
    """Switch layers for both ways whose experts the host has to know."""
    counters = Counters()
    fence = Fence(counters, Mailbox() if needs_pinned_memory() else None)
    return {
        "mlx-lm": [ReadBack(layer.mlp.switch_mlp) for layer in both["mlx-lm"]],
        "few launches": [
            streamed_switch(layer.mlp.switch_mlp.switch, folder / str(number), fence, counters)
            for number, layer in enumerate(both["few launches"])
        ],
    }


def streamed_switch(switch: nn.Module, file: Path, fence: Fence, counters: Counters) -> StreamedSwitchGLU:
    """A switch layer that streams the same experts from a file, and has them all in slots."""
    parts, columns = [], []
    with file.open("wb") as written:
        for name, array in tree_flatten(switch.parameters()):
            begin, size = written.tell(), array.nbytes // len(array)
            written.write(memoryview(array.view(mx.uint8)))
            parts.append(ExpertPart(name, array.shape[1:], array.dtype, array.dtype))
            columns.append([Span(str(file), begin + expert * size, size) for expert in range(len(array))])
    table = ExpertTable(str(file), tuple(parts), list(zip(*columns, strict=True)))
    pinned = PinnedBuffers(table.slot_nbytes, 10) if needs_pinned_memory() else None
    pool = Pool(table.experts, table, Reader([str(file)], 8, counters), counters, pinned)
    pool.load(table, range(table.experts))
    return StreamedSwitchGLU(copy.deepcopy(switch), table, pool, fence)


def cache_of(layer: nn.Module, context: int, dtype: mx.Dtype) -> ArraysCache | KVCache:
    """What a layer remembers of a context, at random."""
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
    """Decode; the first tokens, for which MLX has other memory at hand than it will reuse, are not timed."""
    for _ in range(UNTIMED):
        x = forward(layers, caches, x)
        mx.eval(x)
    begin = time.perf_counter()
    for _ in range(tokens):
        following = forward(layers, caches, x)
        mx.async_eval(following)
        mx.eval(x)
        x = following
    mx.eval(x)
    return (time.perf_counter() - begin) / tokens / len(layers)


def host_seconds(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array) -> float:
    """What Python needs for a layer until its graph is built."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        x = forward(layers, caches, x)
        times.append((time.perf_counter() - begin) / len(layers))
        mx.eval(x)
    return median(times)


def launches(layers: Sequence[nn.Module], caches: Sequence[Any], x: mx.array) -> int:
    """Operations of a layer's graph that are no views, without its experts."""
    x = layers[0](x, None, caches[0])
    mx.eval(x)  # a layer's input comes from another layer
    layer, cache = layers[1], caches[1]
    switch, layer.mlp.switch_mlp = layer.mlp.switch_mlp, NoExperts()
    y = layer(x, None, cache)
    layer.mlp.switch_mlp = switch
    graph = io.StringIO()
    state = cache.cache if isinstance(cache, ArraysCache) else [cache.keys, cache.values]
    mx.export_to_dot(graph, y, *state)
    return sum(name not in VIEWS for name in re.findall(r'\[label ="(\w+)", shape=rectangle\]', graph.getvalue()))


def layer_nbytes(layer: nn.Module, cache: Any) -> int:
    """Bytes that a token moves: the trunk, its experts, and what the layer remembers."""
    switch = sum(array.nbytes for _, array in tree_flatten(layer.mlp.switch_mlp.parameters()))
    trunk = sum(array.nbytes for _, array in tree_flatten(layer.parameters())) - switch
    read = cache.cache if isinstance(cache, ArraysCache) else cache.keys_and_values()
    state = sum(part.nbytes for part in read) * (2 if layer.is_linear else 1)  # a GatedDeltaNet's is written, too
    return trunk + switch * layer.mlp.top_k // layer.mlp.num_experts + state


def measure(
    kind: str,
    both: dict[str, list[nn.Module]],
    asking: dict[str, list[nn.Module]],
    context: int,
    args: argparse.Namespace,
    dtype: mx.Dtype,
) -> list[dict[str, Any]]:
    """The figures of each way for one kind of layer at one context."""
    x = mx.random.normal((1, 1, both["mlx-lm"][0].input_layernorm.weight.size)).astype(dtype)
    fresh = lambda layers: [cache_of(layer, max(1, context - args.tokens - UNTIMED), dtype) for layer in layers]  # noqa: E731
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
            if turn:  # the first warms up
                times[way].append(figures)
    lines = []
    for way, layers in both.items():
        alone, read_back = (median(each) for each in zip(*times[way], strict=True))
        line = {
            "kind": kind,
            "context": context,
            "way": way,
            "without": " ".join(args.twins),
            "launches": launches(layers, fresh(layers[:2]), x),
            "mb": round(layer_nbytes(layers[0], fresh(layers[:1])[0]) / 1e6, 1),
            "host_us": round(1e6 * host_seconds(layers, fresh(layers), x), 1),
            "us": round(1e6 * alone, 1),
            "read_back_us": round(1e6 * read_back, 1),
        }
        theirs = lines[0] if lines else line
        line |= {
            "ratio": round(line["us"] / theirs["us"], 3),
            "read_back_ratio": round(line["read_back_us"] / theirs["read_back_us"], 3),
        }
        lines.append(line)
        print(
            f"{kind}, context {context}, {way}: {line['launches']} launches, {line['host_us']} us to build the graph, "
            f"{line['us']} us a layer ({line['ratio']} of mlx-lm's), {line['read_back_us']} with read-back "
            f"({line['read_back_ratio']})",
            flush=True,
        )
    return lines


def difference(both: dict[str, list[nn.Module]], context: int, dtype: mx.Dtype) -> float:
    """How far the outputs of the two ways lie apart after one layer, relative to their size."""
    layers = [layers[0] for layers in both.values()]
    cache = cache_of(layers[0], context, dtype)
    x = mx.random.normal((1, 1, layers[0].input_layernorm.weight.size)).astype(dtype)
    theirs, ours = (layer(x, None, copy.deepcopy(cache)).astype(mx.float32) - x for layer in layers)
    return (mx.linalg.norm(theirs - ours) / mx.linalg.norm(theirs)).item()


def streamed(dims: dict[str, int], turns: int, layers: int, dtype: mx.Dtype) -> dict[str, Any]:
    """Tokens a second of a whole model of both kinds of layers: mlx-lm's in memory, ours streamed with hits only."""
    text = dims | {"model_type": "qwen3_5_moe_text", "num_hidden_layers": layers, "vocab_size": 2048}
    text |= {"rope_parameters": ROPE, "full_attention_interval": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    config = {"model_type": "qwen3_5_moe", "text_config": text, "vocab_size": 2048}
    prompt = list(range(2, 66))
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), config, quantization={"group_size": 64, "bits": 4}, dtype=dtype)
        print("checkpoint written", flush=True)
        resident = load_resident(name)
        with mock.patch.object(budget.Share, "all_resident", False):  # a slot for every expert, and the router asked
            ours, _ = flashmoe_mlx.load(name, ram_budget=_all_experts(name))
        ways = [seconds_per_token(model, prompt, 16, lambda: None) for model in (resident, ours)]
        for _ in range(4):
            [next(way) for way in ways]  # warm up, and bring all experts
        counters = ours.streaming.counters
        misses = counters.misses
        pairs = []
        for turn in range(turns):
            pairs.append([next(way) for way in ways])
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


def _all_experts(folder: str) -> int:
    return flashmoe_mlx.load(folder, lazy=True)[0].streaming.experts_nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", choices=DIMS, default="397b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 4096, 32768])
    parser.add_argument("--kinds", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--tokens", type=int, default=64, help="a turn's")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--twins", nargs="+", default=[], help="kernels to leave out", metavar="KERNEL")
    parser.add_argument("--streamed", action="store_true", help="decode a whole model, its experts streamed")
    parser.add_argument("--record", action="store_true", help="append the figures to results/trunk.csv")
    args = parser.parse_args()
    mx.random.seed(0)
    on_gpu = mx.default_device().type == mx.gpu
    dtype = mx.bfloat16 if on_gpu else mx.float32
    for name in args.twins:
        module = trunk_ops if hasattr(trunk_ops, f"{name}_twin") else ops
        setattr(module, name, getattr(module, f"{name}_twin"))
    if args.streamed:
        figures = streamed(DIMS[args.dims], args.turns, args.layers, dtype)
        if args.record:
            record("trunk_streamed", {"dims": args.dims} | figures)
        print(json.dumps(figures))
        return

    rate = copy_bandwidth(2**26)
    print(f"copy: {rate / 1e12:.2f} TB/s", flush=True)
    text = DIMS[args.dims] | {"rope_parameters": ROPE, "rms_norm_eps": 1e-6}
    lines: list[dict[str, Any]] = []
    for kind in args.kinds:
        model_args = qwen3_5.TextModelArgs.from_dict(text)
        begin = time.perf_counter()
        both = ways([random_layer(model_args, KINDS[kind], dtype) for _ in range(args.layers)])
        print(f"{kind}: {args.layers} layers in {time.perf_counter() - begin:.1f} s", flush=True)
        print(f"{kind}: outputs differ by {difference(both, 128, dtype):.1e}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            asking = read_back(both, Path(name))
        print(f"{kind}: experts in slots after {time.perf_counter() - begin:.1f} s", flush=True)
        for context in args.contexts if kind == "attention" else args.contexts[:1]:  # a state is as large as ever
            lines += measure(kind, both, asking, context, args, dtype)
        del both, asking
        mx.clear_cache()
    if args.record:
        for line in lines:
            record("trunk", {"dims": args.dims} | line | {"copy_tb_per_s": round(rate / 1e12, 3)})
    print(json.dumps({"copy_tb_per_s": round(rate / 1e12, 3), "lines": lines}))


if __name__ == "__main__":
    main()
