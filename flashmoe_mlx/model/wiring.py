"""Wired memory on Metal: set once when a model is loaded, and kept from one request to the next."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from importlib import import_module

import mlx.core as mx
import mlx.nn as nn

from flashmoe_mlx.system.metal import computes_on_metal, wire

# Tokens whose KV cache is wired with the model.
_CONTEXT = 32_768

_WiredLimit = Callable[[nn.Module, Sequence[mx.Stream] | None], AbstractContextManager[None]]


def wire_model(model: nn.Module) -> None:
    """Keep trunk, slots and the KV cache of a context of 32,768 tokens wired from now on, if MLX computes on Metal.

    mlx-lm raises the limit at the beginning of each request and lowers it at the end, which adds and removes every
    array of the model, and it wires activations as well. For streamed models it no longer does.

    Args:
        model (nn.Module): Loaded, with ``model.streaming``.
    """
    if not computes_on_metal():
        return
    # Freed buffers that MLX keeps would be wired as well.
    mx.clear_cache()
    streaming = model.streaming
    # Less is active if the trunk is loaded lazily.
    resident = max(mx.get_active_memory(), streaming.trunk_nbytes + streaming.slots_nbytes)
    wire(resident + _CONTEXT * streaming.kv_token_nbytes)
    _keep_limit()


@cache
def _keep_limit() -> None:
    # The package has a function of the module's name.
    module = import_module("mlx_lm.generate")
    module.wired_limit = partial(_wired_limit, module.wired_limit)  # type: ignore[attr-defined]  # mlx-lm is untyped


@contextmanager
def _wired_limit(original: _WiredLimit, model: nn.Module, streams: Sequence[mx.Stream] | None = None) -> Iterator[None]:
    """Do what mlx-lm's context manager of this name does, but leave the limit alone for a streamed model."""
    if not hasattr(model, "streaming"):
        with original(model, streams):
            yield
        return
    try:
        yield
    finally:
        for stream in streams or ():
            mx.synchronize(stream)
