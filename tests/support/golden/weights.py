"""A tiny Qwen3.5-MoE checkpoint in the raw Hugging Face layout, made of numbers that every platform reproduces.

The golden logits next to this file are what transformers computes from it (see make_golden.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

# Key heads are 32 wide because mlx-lm's Metal kernel spreads one over 32 lanes, and every matrix can be quantized in
# groups of 64.  Widths that are easily confused differ: 2 key and 4 value heads, 64 hidden and 128 inside an expert.
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "float32",
        "full_attention_interval": 4,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 1024,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 128,
        "num_attention_heads": 4,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10_000_000,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": 128,
        "tie_word_embeddings": False,
        "vocab_size": 320,
    },
    "tie_word_embeddings": False,
}

TOKENS: list[int] = [(37 * i * i + 11) % 320 for i in range(48)]

# Of the first 150, the one whose routing stays furthest from ties (make_golden.py checks).
_SEED = 133


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor under its raw Hugging Face name."""
    text = CONFIG["text_config"]
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    experts, inner, shared = text["num_experts"], text["moe_intermediate_size"], text["shared_expert_intermediate_size"]
    head, q_heads, kv_heads = text["head_dim"], text["num_attention_heads"], text["num_key_value_heads"]
    v_heads, v_head = text["linear_num_value_heads"], text["linear_value_head_dim"]
    k_dim, v_dim = text["linear_num_key_heads"] * text["linear_key_head_dim"], v_heads * v_head

    linear_attention = {
        "linear_attn.A_log": (v_heads,),
        "linear_attn.conv1d.weight": (2 * k_dim + v_dim, 1, text["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (v_heads,),
        "linear_attn.in_proj_a.weight": (v_heads, hidden),
        "linear_attn.in_proj_b.weight": (v_heads, hidden),
        "linear_attn.in_proj_qkv.weight": (2 * k_dim + v_dim, hidden),
        "linear_attn.in_proj_z.weight": (v_dim, hidden),
        "linear_attn.norm.weight": (v_head,),
        "linear_attn.out_proj.weight": (hidden, v_dim),
    }
    full_attention = {
        "self_attn.k_norm.weight": (head,),
        "self_attn.k_proj.weight": (kv_heads * head, hidden),
        "self_attn.o_proj.weight": (hidden, q_heads * head),
        "self_attn.q_norm.weight": (head,),
        # Each head's query, then its output gate.
        "self_attn.q_proj.weight": (2 * q_heads * head, hidden),
        "self_attn.v_proj.weight": (kv_heads * head, hidden),
    }
    every_layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.experts.down_proj": (experts, hidden, inner),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, hidden),
        "mlp.gate.weight": (experts, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "post_attention_layernorm.weight": (hidden,),
    }
    mixers = {"linear_attention": linear_attention, "full_attention": full_attention}

    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocab, hidden),
        "model.language_model.embed_tokens.weight": (vocab, hidden),
        "model.language_model.norm.weight": (hidden,),
    }
    for index, kind in enumerate(text["layer_types"]):
        for name, shape in (mixers[kind] | every_layer).items():
            shapes[f"model.language_model.layers.{index}.{name}"] = shape
    return shapes


def _center_and_spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Return the middle and the half-width of the interval that a tensor's values fill evenly."""
    if name.endswith("A_log"):
        # A token decays the state by 0.35 to 0.98: both short and long memory count.
        return -1.5, 1.5
    if name.endswith("dt_bias"):
        return 0.0, 1.0
    if name.endswith("linear_attn.norm.weight"):
        return 1.0, 0.2
    if name.endswith("norm.weight"):
        # All the other norms multiply by 1 + weight.
        return 0.0, 0.2
    # Fan-in scaling: outputs vary as much as inputs.
    return 0.0, (3 / shape[-1]) ** 0.5


def weights() -> dict[str, np.ndarray]:
    """Return every tensor in float32 under its raw Hugging Face name.

    Uniform values, because `Generator.random` only shifts and scales PCG64's integers: unlike a normal draw it calls
    no libm and has no algorithm to revise, so the golden logits stay valid on other platforms and numpy versions.
    """
    generator = np.random.Generator(np.random.PCG64(_SEED))
    tensors = {}
    for name, shape in sorted(_shapes().items()):
        center, spread = _center_and_spread(name, shape)
        tensors[name] = (center + spread * (2 * generator.random(shape) - 1)).astype(np.float32)
    return tensors


def write(folder: Path) -> None:
    """Write config.json, two safetensors shards and their index into `folder`, which must exist."""
    tensors = weights()
    names = list(tensors)
    middle = len(names) // 2
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {},
    }
    for number, shard in enumerate((names[:middle], names[middle:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
