"""Copies of a checkpoint with fewer bits for its experts, made by rounding to the nearest."""

import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import dequantize_model, quantize_model, save

from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.model.families import switch_layers

BITS = (2, 3, 4, 5, 6, 8)
"""Bits per weight that MLX's affine quantization offers."""


def expert_bits(folder: Path) -> int | None:
    """Bits of a checkpoint's experts, or ``None`` where they are not quantized, or not all to the same.

    Raises:
        ValueError: it has no experts.
    """
    model, _, config = mlx_lm.load(str(folder), lazy=True, return_config=True)
    layers = [layer for switch in _switches(model, config, folder) for _, layer in switch.named_modules()]
    bits = {
        getattr(layer, "bits", None) for layer in layers if isinstance(layer, (SwitchLinear, QuantizedSwitchLinear))
    }
    return bits.pop() if len(bits) == 1 else None


def requantize(folder: Path, bits: int, cache: Path) -> Path:
    """A checkpoint whose experts have fewer bits; made the first time, found in the cache from then on.

    These are the steps of ``mlx_lm.convert --quantize``, for the experts alone: everything else keeps its bytes.
    Experts that are quantized already are dequantized first. Rounding is to the nearest, without calibration.

    Args:
        folder (Path): the checkpoint to start from. It is not changed.
        bits (int): one of :data:`BITS`.
        cache (Path): the folder of such copies; made if it does not exist.

    Returns:
        Path: the copy's folder.

    Raises:
        ValueError: other bits, or a checkpoint without experts.
        OSError: it cannot be written.
    """
    if bits not in BITS:
        raise ValueError(f"bits is {bits}: MLX quantizes to {', '.join(map(str, BITS))}")
    copy = cache / f"{folder.resolve().name}-{model_identity(folder)[:12]}-experts-{bits}bit"
    if copy.is_dir():
        return copy
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache) as unfinished:
        with redirect_stdout(sys.stderr):  # mlx-lm tells what it does
            _requantize(folder, bits, Path(unfinished) / copy.name)
        (Path(unfinished) / copy.name).rename(copy)
    return copy


def _requantize(folder: Path, bits: int, copy: Path) -> None:
    model, tokenizer, config = mlx_lm.load(str(folder), lazy=True, return_config=True)
    switches = _switches(model, config, folder)
    quantized = (layer for _, layer in switches[0].named_modules() if isinstance(layer, QuantizedSwitchLinear))
    group_size = next((layer.group_size for layer in quantized), None)
    for switch in switches:
        dequantize_model(switch)
    model, config = quantize_model(model, config, group_size, bits, quant_predicate=_is_expert)
    save(copy, folder, model, tokenizer, config)


def _switches(model: nn.Module, config: dict[str, Any], folder: Path) -> list[nn.Module]:
    switches = list(switch_layers(model).values())
    if not switches:
        raise ValueError(f"{folder} is a {config['model_type']} without routed experts: there are none to quantize")
    return switches


def _is_expert(path: str, module: nn.Module) -> bool:
    return isinstance(module, SwitchLinear)
