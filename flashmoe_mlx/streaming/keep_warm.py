"""Small products that keep the clock of a Metal GPU up while the host waits for the disk."""

import threading
import time
import warnings
from collections.abc import Callable

import mlx.core as mx

from flashmoe_mlx.system.metal import computes_on_metal
from flashmoe_mlx.system.power import on_battery

# Rows and columns of the operands: about 10 us of an Apple GPU.
_SIZE = 256

# Seconds between two looks at the power supply.
_POWER_SECONDS = 30.0


class KeepWarm:
    """Launches a small product from time to time, so that an idle GPU does not lower its clock.

    During a decode step the GPU waits for the disk in most layers, and Apple's lower their clock within such a wait, so
    that the kernels after it run slower. The products run on a stream of their own, and nothing depends on them. The
    waiting thread launches them itself: MLX's arrays belong to the thread that made them, and the last launch is over
    when the wait is.

    Args:
        device (mx.Device): Computes the products.
        on_battery (Callable, optional): Returns whether the machine runs on its battery. Nothing is launched then.
            Default: ``None``, launch in any case.

    Attributes:
        interval (float): Seconds between two launches.
    """

    interval = 5e-4

    def __init__(self, device: mx.Device, on_battery: Callable[[], bool] | None = None):
        self._device = device
        self._on_battery = on_battery
        self._off = False
        self._next_look = 0.0
        self._failed = False
        # Streams and arrays cannot be used by other threads.
        self._of_thread = threading.local()

    def is_on(self) -> bool:
        """Return whether :meth:`launch` should be called now. It asks for the power supply twice a minute at most."""
        if self._on_battery is not None and (now := time.perf_counter()) >= self._next_look:
            self._next_look = now + _POWER_SECONDS
            self._off = self._on_battery()
        return not (self._off or self._failed)

    def launch(self) -> None:
        """Start a product, without waiting for it. After an error of MLX, nothing is launched any more."""
        if self._failed:
            return
        try:
            self._launch()
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"the GPU is not kept warm while it waits for the disk: {error}", stacklevel=2)

    def _launch(self) -> None:
        if not hasattr(self._of_thread, "operand"):
            self._of_thread.stream = mx.new_stream(self._device)
            # Nothing of it on the default stream, where it would wait for the model.
            self._of_thread.operand = mx.ones((_SIZE, _SIZE), stream=self._of_thread.stream)
        operand = self._of_thread.operand
        mx.async_eval(mx.matmul(operand, operand, stream=self._of_thread.stream))  # type: ignore[no-untyped-call]


def make_keep_warm(setting: str) -> KeepWarm | None:
    """Return what keeps the default device's clock up, or ``None`` if it is not to be, or not a Metal GPU.

    Args:
        setting (str): ``Config.keep_warm``.
    """
    if setting == "off" or not computes_on_metal():
        return None
    return KeepWarm(mx.default_device(), on_battery if setting == "auto" else None)
