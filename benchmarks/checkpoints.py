"""Writes checkpoints with random weights, of any MoE family of mlx-lm, in the layout of the mlx-community uploads.

    python -m benchmarks.checkpoints FOLDER --layers 8 --experts 128 --top-k 10 --hidden 256 --intermediate 128

They show the speed, memory use and exactness of a real model of that size, and nothing about quality.
"""

import argparse
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes, quantize_model, save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flashmoe_mlx.system.atomic_write import replacing

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def qwen3_5_moe(*, layers: int, experts: int, top_k: int, hidden: int, intermediate: int, vocab: int) -> dict[str, Any]:
    """Return the config.json of a Qwen3.5-MoE: every fourth layer attends, the others are GatedDeltaNet."""
    text_config = {
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "vocab_size": vocab,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": intermediate,
        "shared_expert_intermediate_size": intermediate,
        "full_attention_interval": 4,
        "num_attention_heads": max(2, hidden // 64),
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": max(2, hidden // 128),
        "linear_num_value_heads": max(4, hidden // 64),
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "rope_type": "default"},
        "tie_word_embeddings": False,
    }
    return {"model_type": "qwen3_5_moe", "text_config": text_config, "vocab_size": vocab}


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    quantization: dict[str, Any] | None = None,
    quant_predicate: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None,
    dtype: mx.Dtype = mx.float32,
    shards: int = 3,
    seed: int = 0,
) -> None:
    """Write a random checkpoint with tokenizer and chat template, a part at a time.

    Args:
        folder (Path): Folder of the checkpoint; made if it does not exist.
        config (dict): Its config.json, without quantization.
        quantization (dict, optional): ``group_size``, ``bits``, ``mode`` as for mlx-lm's ``quantize_model``.
        quant_predicate (Callable, optional): Modules that are quantized differently, as for ``quantize_model``.
            Default: the family's own choice.
        dtype (mx.Dtype): Of scales and of weights that are not quantized.
        shards (int): Number of safetensors files.
        seed (int): Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Written last, because a folder without it is not a model.
    (folder / "config.json").unlink(missing_ok=True)
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    _fill_zeros(model)
    model.set_dtype(dtype)
    if quantization is not None:
        keys = {"group_size": None, "bits": None} | quantization
        model, config = quantize_model(model, config, **keys, quant_predicate=quant_predicate)
    weights = tree_flatten(model.parameters())
    del model
    _write_shards(folder, weights, shards)
    tokenizer = _train_tokenizer(config["vocab_size"])
    tokenizer.save_pretrained(folder)
    with replacing(folder / "config.json") as unfinished:
        save_config(config | {"eos_token_id": tokenizer.eos_token_id}, unfinished)


def _fill_zeros(model: nn.Module) -> None:
    """Make parameters random that a family initializes with zeros: such a router would choose the same for all tokens.

    Large ones are skipped. None of them is zero, and looking at one would compute and keep it.
    """
    for name, parameter in tree_flatten(model.parameters()):
        if parameter.size <= 1 << 22 and not mx.any(parameter).item():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
            model.update(tree_unflatten([(name, mx.random.normal(parameter.shape, parameter.dtype) * scale)]))


def _write_shards(folder: Path, weights: list[tuple[str, mx.array]], shards: int) -> None:
    """Write files of about equal size and their index; each tensor is computed when its file is written."""
    total = sum(array.nbytes for _, array in weights)
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        part: dict[str, mx.array] = {}
        while weights and (number == shards or sum(a.nbytes for a in part.values()) < ceil(total / shards)):
            key, part[key] = weights.pop(0)
            mx.eval(part[key])
        mx.save_safetensors(str(folder / name), part, metadata={"format": "mlx"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _train_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on Python's own manual, so that random text is made of word pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for _, text in sorted(topics.items())), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made if it does not exist")
    parser.add_argument("--layers", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--experts", type=int, default=128, help="routed experts per layer (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="routed experts per token (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model (default: %(default)s)")
    parser.add_argument("--intermediate", type=int, default=128, help="width of an expert (default: %(default)s)")
    parser.add_argument("--vocab", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="per quantized weight (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "float16", "bfloat16"],
        default="bfloat16",
        help="of everything else (default: %(default)s)",
    )
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("layers", "experts", "top_k", "hidden", "intermediate", "vocab")}
    quantization = {"group_size": 64, "bits": args.bits}
    write_checkpoint(args.folder, qwen3_5_moe(**shape), quantization=quantization, dtype=getattr(mx, args.dtype))
    nbytes = sum(file.stat().st_size for file in args.folder.iterdir())
    print(f"{args.folder}: {nbytes / 1e6:.0f} MB of random weights")


if __name__ == "__main__":
    main()
