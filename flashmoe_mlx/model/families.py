"""Names that model families give to routed experts, routers and shared experts. A new family may need one more."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, language_config
from flashmoe_mlx.model.precision import computed_dtype
from flashmoe_mlx.ops.dispatch import Backend

# Keys of config.json with the number of routed experts per token.
_TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)

# Names of a block's children beside its switch layer that need no routed expert.
_SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
_ROUTERS = ("gate", "router")


def switch_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return mlx-lm's switch layers of a model by their paths, in the order of their layers."""
    found = ((path, module) for path, module in model.named_modules() if isinstance(module, (SwitchGLU, SwitchMLP)))
    return dict(sorted(found, key=lambda pair: [int(number) for number in re.findall(r"\d+", pair[0])]))


def find_experts(
    model: nn.Module, checkpoint: Checkpoint, backend: Backend
) -> tuple[dict[str, nn.Module], list[ExpertTable]]:
    """Return the switch layers of a lazily loaded model by their paths, in order, and where the experts of each lie.

    Raises:
        ValueError: There are none, or their bytes cannot be used as they are.
    """
    switches = switch_layers(model)
    if not switches:
        raise ValueError(
            f"{checkpoint.folder} is a {checkpoint.config['model_type']} without routed experts: there is nothing to "
            "stream. Run it with mlx_lm.generate"
        )
    computed = partial(computed_dtype, backend=backend)
    tables = [
        ExpertTable.build(checkpoint, path, dict(tree_flatten(switch.parameters())), computed)
        for path, switch in switches.items()
    ]
    return switches, tables


def top_k_settings(config: Mapping[str, Any], wanted: int | None) -> tuple[int, dict[str, Any]]:
    """Return the checkpoint's own number of experts per token, and the config entries that change it.

    Args:
        config (Mapping): config.json.
        wanted (int, optional): Experts per token instead of the checkpoint's; ``None`` changes nothing.

    Raises:
        ValueError: config.json does not say how many experts a token uses, or has a number below 1.
    """
    text_config = config.get("text_config") or {}
    outer = [key for key in _TOP_K_KEYS if isinstance(config.get(key), int)]
    inner = [key for key in _TOP_K_KEYS if isinstance(text_config.get(key), int)]
    native = text_config[inner[0]] if inner else config[outer[0]] if outer else 0
    key = (inner or outer or [""])[0]
    if key and native < 1:
        raise ValueError(
            f"config.json of this {config['model_type']} has {key} {native}: it must be a positive integer, else there "
            "are no experts to stream"
        )
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


def hidden_size(config: Mapping[str, Any]) -> int | None:
    """Return the width of the model, which is that of the inputs of routers and shared experts."""
    return language_config(config).get("hidden_size")


def shared_expert(block: nn.Module) -> nn.Module | None:
    """Return the shared expert of a MoE block, if it has one."""
    return _child(block, _SHARED_EXPERTS)


def router(block: nn.Module) -> nn.Module | None:
    """Return the router of a MoE block, if it is a module of its own."""
    return _child(block, _ROUTERS)


def _child(block: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((block[name] for name in names if isinstance(block.get(name), nn.Module)), None)
