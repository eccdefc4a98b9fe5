"""Tests run on the CPU, where equal means every bit, except for those marked ``metal``."""

import mlx.core as mx

# Before mlx_lm is imported, which keeps a stream of the default device.
mx.set_default_device(mx.cpu)
