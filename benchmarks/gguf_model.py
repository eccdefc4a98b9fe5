"""Writes a random Qwen3-MoE in llama.cpp's format, and decodes with it, in a Python with gguf and llama-cpp-python.

    python benchmarks/gguf_model.py write FILE --layers 8 --experts 256 ...
    python benchmarks/gguf_model.py decode FILE --threads 2

``decode`` reads numbers of tokens from its input, decodes that many random ones and writes the seconds that this took.
By default llama.cpp copies all weights into memory, in an order that is faster to read.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Bytes of a block of 32 weights in Q4_0: a float16 scale and 4 bits each.
_BLOCK_NBYTES = 18


def write(args: argparse.Namespace) -> None:
    """Write the file, one tensor after the other."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(args.file, "qwen3moe", use_temp_file=True)
    writer.add_context_length(32768)
    writer.add_embedding_length(args.hidden)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.intermediate)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_expert_count(args.experts)
    writer.add_expert_used_count(args.top_k)
    writer.add_expert_feed_forward_length(args.intermediate)
    writer.add_vocab_size(args.vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    def quantized(name: str, *shape: int, size: float | None = None) -> None:
        """Add weights with mean 0, and of a usual size in a matrix product of ``shape[-1]`` columns."""
        blocks = rng.integers(1, 16, (*shape[:-1], shape[-1] // 32, _BLOCK_NBYTES), np.uint8)
        blocks |= rng.integers(1, 16, blocks.shape, np.uint8) << 4
        # 4.3 is the standard deviation of 15 equal steps.
        scale = np.float16((size or shape[-1] ** -0.5) / 4.3)
        blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
        data = blocks.reshape(*shape[:-1], -1)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    # Larger than what layers add. Otherwise all tokens look the same to routers, which choose the same experts.
    quantized("token_embd.weight", args.vocab, args.hidden, size=4)
    for layer in range(args.layers):
        name = f"blk.{layer}."
        ones(name + "attn_norm.weight", args.hidden)
        quantized(name + "attn_q.weight", args.heads * args.head_dim, args.hidden)
        quantized(name + "attn_k.weight", args.kv_heads * args.head_dim, args.hidden)
        quantized(name + "attn_v.weight", args.kv_heads * args.head_dim, args.hidden)
        quantized(name + "attn_output.weight", args.hidden, args.heads * args.head_dim)
        ones(name + "attn_q_norm.weight", args.head_dim)
        ones(name + "attn_k_norm.weight", args.head_dim)
        ones(name + "ffn_norm.weight", args.hidden)
        router = rng.standard_normal((args.experts, args.hidden), np.float32) * args.hidden**-0.5
        writer.add_tensor(name + "ffn_gate_inp.weight", router)
        quantized(name + "ffn_gate_exps.weight", args.experts, args.intermediate, args.hidden)
        quantized(name + "ffn_up_exps.weight", args.experts, args.intermediate, args.hidden)
        quantized(name + "ffn_down_exps.weight", args.experts, args.hidden, args.intermediate)
    ones("output_norm.weight", args.hidden)
    quantized("output.weight", args.vocab, args.hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(args: argparse.Namespace) -> None:
    """Serve turns until the input ends."""
    import llama_cpp

    if args.mapped:
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        # Llama has no argument for it.
        def without_copies() -> Any:
            params = defaults()
            params.use_extra_bufts = False
            return params

        llama_cpp.llama_cpp.llama_model_default_params = without_copies
    model = llama_cpp.Llama(
        str(args.file), n_ctx=8192, n_threads=args.threads, n_threads_batch=args.threads, verbose=False
    )
    rng = np.random.default_rng(0)
    vocab = model.n_vocab()

    def evaluate(tokens: Any) -> float:
        begin = time.perf_counter()
        model.eval([int(token) for token in tokens])
        return time.perf_counter() - begin

    evaluate(rng.integers(0, vocab, 16))
    print("ready", flush=True)
    for line in sys.stdin:
        if model.n_tokens + int(line) > 8192:
            model.reset()
        print(sum(evaluate(rng.integers(0, vocab, 1)) for _ in range(int(line))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["write", "decode"])
    parser.add_argument("file", type=Path, help="the model")
    parser.add_argument("--threads", type=int, default=1, help="to decode with (default: %(default)s)")
    parser.add_argument("--mapped", action="store_true", help="decode from the mapped file, without a copy in memory")
    sizes = parser.add_argument_group("sizes of the model to write")
    sizes.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    sizes.add_argument("--experts", type=int, default=256, help="(default: %(default)s)")
    sizes.add_argument("--top-k", type=int, default=8, help="(default: %(default)s)")
    sizes.add_argument("--hidden", type=int, default=2048, help="(default: %(default)s)")
    sizes.add_argument("--intermediate", type=int, default=512, help="(default: %(default)s)")
    sizes.add_argument("--vocab", type=int, default=2048, help="(default: %(default)s)")
    sizes.add_argument("--heads", type=int, default=32, help="(default: %(default)s)")
    sizes.add_argument("--kv-heads", type=int, default=4, help="(default: %(default)s)")
    sizes.add_argument("--head-dim", type=int, default=128, help="(default: %(default)s)")
    args = parser.parse_args()
    {"write": write, "decode": decode}[args.command](args)


if __name__ == "__main__":
    main()
