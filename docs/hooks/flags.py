"""Replace ``<!-- flags: module -->`` by tables of the flags of a command, read from its own parser.

``<!-- flags: module group -->`` is one group alone; the group that many commands share is only named in their tables.
The parsers are imported when the site is built, so that a flag, its help or its default cannot be out of date.
"""

import argparse
import html
import importlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig

_MARK = re.compile(r"^<!-- flags: (\S+)(?: (.+))? -->$", re.MULTILINE)
_SHARED = "expert streaming"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Name the versions whose flags the pages show."""
    packages = {"flashmoe_mlx": "flashmoe-mlx", "MLX": "mlx", "mlx-lm": "mlx-lm"}
    config.copyright = "Built with " + ", ".join(f"{name} {version(package)}" for name, package in packages.items())
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page.

    Raises:
        ImportError: a command, or something that it imports, is not installed.
        KeyError: it has no such group.
    """
    return _MARK.sub(lambda mark: _group(mark[1], mark[2]) if mark[2] else _tables(mark[1]), markdown)


def _group(module: str, title: str) -> str:
    parser = _parser(module)
    return _table(parser, {group.title: group for group in parser._action_groups}[title])


def _tables(module: str) -> str:
    parser = _parser(module)
    tables = []
    for group in parser._action_groups:
        if group.title == _SHARED:
            tables.append(f"**{_SHARED.capitalize()}**: see [above](#{_SHARED.replace(' ', '-')}).")
        elif group._group_actions:
            tables.append(f"**{(group.title or 'flags').capitalize()}**\n\n{_table(parser, group)}")
    return "\n\n".join(tables)


def _parser(module: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(module).setup_arg_parser()
    return parser


def _table(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> str:
    actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS and action.dest != "help"]
    rows = [f"| {_name(action)} | {_meaning(parser, action)} |" for action in actions]
    return "\n".join(["| flag | meaning |", "| --- | --- |", *rows])


def _name(action: argparse.Action) -> str:
    value = ""
    if action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
        value = str(action.metavar or choices or action.dest.upper()) + (" ..." if action.nargs == "+" else "")
    names = [f"{name} {value}".strip() for name in action.option_strings] or [value]
    return "<br>".join(f"<code>{_escape(name)}</code>" for name in names)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = " ".join(parser._get_formatter()._expand_help(action).split()) if action.help else ""
    known = isinstance(action.default, bool) or action.default in (None, argparse.SUPPRESS) or "default" in text.lower()
    if not known and str(action.default) not in ("", "[]", "{}"):
        text += f" (default: {action.default})"
    # The builder's home folder is not the reader's.
    return _escape(text.replace(str(Path.home()), "~"))


def _escape(text: str) -> str:
    return html.escape(text, quote=False).translate({ord(sign): f"&#{ord(sign)};" for sign in "|*_`[]\\"})
