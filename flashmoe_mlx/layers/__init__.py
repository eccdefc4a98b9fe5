"""Drop-ins for mlx-lm's modules: streamed, fused, or computed by native CPU kernels."""
