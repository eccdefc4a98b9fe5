"""Load a model: plan its memory, swap its layers, and return an mlx-lm model."""
