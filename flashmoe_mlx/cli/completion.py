"""Tab completion of commands and their flags."""

import argparse
from importlib import import_module

import shtab

from flashmoe_mlx.cli.commands import COMMANDS

_VALUES = {"FILE": shtab.FILE, "FOLDER": shtab.DIRECTORY}
"""Completion of a flag's value, by its metavar."""


def command_parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command by the command's name, with what shtab needs to complete paths."""
    parsers = {}
    for command in COMMANDS:
        parser = import_module(f"flashmoe_mlx.{command.module}").setup_arg_parser()
        for action in parser._actions:
            metavar = "FOLDER" if action.dest == "model" else action.metavar
            if metavar in _VALUES:
                action.complete = _VALUES[metavar]
        parsers[command.name] = parser
    return parsers


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return a script for ``bash``, ``zsh`` or ``fish`` that completes what a parser takes."""
    return str(shtab.complete(parser, shell))
