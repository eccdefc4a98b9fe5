"""Names that model families give to routed experts, routers and shared experts."""

import re
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint

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


def _hidden(config: Mapping[str, Any]) -> int | None:
    """Width of the model, which the input of shared experts and routers has."""
    return (config.get("text_config") or config).get("hidden_size")
