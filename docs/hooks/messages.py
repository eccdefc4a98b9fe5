"""Replace ``<!-- messages: part ... -->`` by the error messages that these parts of the package can give.

The messages are read from the source: the text of each exception that is made, with words in italics for what is only
known when it happens. A part is a file or a folder, relative to the package. A part without messages and a message that
no page shows are warnings, which fail a strict build.
"""

import ast
import html
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("mkdocs.hooks.messages")
_MARK = re.compile(r"^<!-- messages: (.+) -->$", re.MULTILINE)
_PACKAGE = Path(__file__).parents[2] / "flashmoe_mlx"
_ERROR = re.compile(r"\w*(Error|Refusal)")
# Part of Python's own protocols, not for people.
_UNSEEN = {"AttributeError"}

_shown: set[Path] = set()


def on_pre_build(**_: Any) -> None:
    """Forget what an earlier build has shown."""
    _shown.clear()


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables of a page."""
    return _MARK.sub(lambda mark: _table(mark[1].split()), markdown)


def on_post_build(**_: Any) -> None:
    """Warn of messages that no page shows."""
    for path in sorted(set(_PACKAGE.rglob("*.py")) - _shown):
        if found := dict(_messages(path)):
            _LOG.warning("no page shows %r of %s: name it in docs/troubleshooting.md", next(iter(found)), path.name)


def _table(parts: list[str]) -> str:
    kinds: dict[str, str] = {}
    for part in parts:
        paths = sorted((_PACKAGE / part).rglob("*.py")) or [_PACKAGE / part]
        found = {text: kind for path in paths if path.is_file() for text, kind in _messages(path)}
        if not found:
            _LOG.warning("there are no error messages in flashmoe_mlx/%s: mend docs/troubleshooting.md", part)
        _shown.update(paths)
        kinds |= found
    rows = [f"| {text} | {kind} |" for text, kind in sorted(kinds.items(), key=lambda row: row[0].lower())]
    return "\n".join(["| message | kind |", "| --- | --- |", *rows])


def _messages(path: Path) -> Iterator[tuple[str, str]]:
    """The text and the kind of each message of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        values = sorted(_assignments([*tree.body, *ast.walk(scope)]), key=lambda each: each[1].lineno)
        for node in ast.walk(scope):
            made = node.exc if isinstance(node, ast.Raise) else node
            if isinstance(made, ast.Name):
                made = _value(made, values)
            if isinstance(made, ast.Call) and (isinstance(node, ast.Raise) or _ERROR.fullmatch(_called(made))):
                yield from _of_call(made, values)


def _assignments(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _value(name: ast.Name, values: Sequence[tuple[str, ast.expr]]) -> ast.expr:
    """What a name stands for: the latest assignment to it, or the name itself."""
    return next((value for key, value in reversed(values) if key == name.id and value.lineno <= name.lineno), name)


def _of_call(call: ast.Call, values: Sequence[tuple[str, ast.expr]]) -> Iterator[tuple[str, str]]:
    """The message among the arguments of an exception, or of a function that makes one: the first text of words."""
    if _called(call) in _UNSEEN:
        return
    kind = _called(call) if _ERROR.fullmatch(_called(call)) else ""
    for argument in call.args:
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int):
            kind = f"HTTP {argument.value}"
        text = _text(_value(argument, values) if isinstance(argument, ast.Name) else argument)
        if len(re.findall(r"[a-z]{2,}", re.sub(r"<i>.*?</i>", "", text))) >= 2 and " " in text:
            yield text, kind
            return


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _text(node: ast.expr) -> str:
    """A string expression as HTML, with names for what is filled in; empty if it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return html.escape(node.value, quote=False).translate({ord(sign): f"&#{ord(sign)};" for sign in "|*_`[]{}\\"})
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.FormattedValue):
        return f"<i>{_name(node.value)}</i>"
    return _text(node.left) + _text(node.right) if isinstance(node, ast.BinOp) else ""


def _name(node: ast.expr) -> str:
    """A word for a value: the first name in its expression that is not a function's."""
    functions = {id(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)}
    for each in ast.walk(node):
        if id(each) not in functions and isinstance(each, ast.Attribute | ast.Name):
            name = each.attr if isinstance(each, ast.Attribute) else each.id
            if name != "self":
                return name.strip("_").replace("_", " ").lower()
    return "…"
