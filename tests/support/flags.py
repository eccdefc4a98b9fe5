"""Flags of the commands."""

import argparse

STREAMING = {
    "--ram-budget",
    "--experts-per-token",
    "--read-threads",
    "--read-timeout",
    "--lookahead",
    "--slots",
    "--keep-warm",
    "--kernels",
    "--no-kernels",
    "--warm-start",
    "--manifest",
    "--config",
}
"""Flags that the commands add to those of mlx-lm."""


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """Return all flags of a parser, long and short."""
    return {option for action in parser._actions for option in action.option_strings}
