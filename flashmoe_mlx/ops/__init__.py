"""Functions from arrays to arrays: one per kernel, each with a reference in MLX operations."""
