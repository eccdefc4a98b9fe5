"""The flags of commands."""

import argparse

STREAMING = {
    "--ram-budget",
    "--experts-per-token",
    "--read-threads",
    "--read-timeout",
    "--lookahead",
    "--warm-start",
    "--manifest",
    "--config",
}
"""Those that every command of ours adds to mlx-lm's."""


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {option for action in parser._actions for option in action.option_strings}
