"""The part of the style in CONTRIBUTING.md that can be counted."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "flashmoe_mlx"

QUESTION_WORDS = re.compile(r"\W*((how|what|where|which|who)(ever)?|wherever|whether|whom|whose|why)\b", re.IGNORECASE)
# Directives to tools, and the shape of the array that the line computes.
NOT_PROSE = re.compile(r"#\s*(type: ignore|noqa|fmt: (off|on|skip)|\[)")
TRAILING_SHARE = 0.1
FILE_LINES = 300
README_LINES = 120


def docstrings(source: str) -> Iterator[tuple[int, str]]:
    r"""Yield the line and the text of each docstring, those of attributes and constants included.

    >>> list(docstrings("'A module.'\nx = 1\n'A number.'\ndef f():\n    'A function.'"))
    [(1, 'A module.'), (3, 'A number.'), (5, 'A function.')]
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def comments(source: str) -> Iterator[tuple[int, bool]]:
    r"""Yield the line of each comment in prose, and whether it trails code.

    >>> list(comments("# above\nx = 1  # trailing\ny = 2  # [rows, columns]\nimport z  # noqa: F401\n"))
    [(1, False), (2, True)]
    """
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not NOT_PROSE.match(token.string):
            yield token.start[0], bool(token.line[: token.start[1]].strip())


def sources(folder: str) -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each Python file of a folder of the repository."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        yield path.relative_to(ROOT), path.read_text()


@pytest.mark.parametrize("folder", [PACKAGE, "benchmarks", "demo", "tests"])
def test_docstrings_do_not_begin_with_a_question_word(folder: str) -> None:
    found = [
        f"{path}:{line}: {text.strip().splitlines()[0]}"
        for path, source in sources(folder)
        for line, text in docstrings(source)
        if QUESTION_WORDS.match(text)
    ]
    assert not found, f"{len(found)} docstrings begin with a question word:\n" + "\n".join(found)


@pytest.mark.parametrize("folder", [PACKAGE, "benchmarks", "demo", "tests"])
def test_comments_stand_above_the_code(folder: str) -> None:
    found = [(path, line, trails) for path, source in sources(folder) for line, trails in comments(source)]
    trailing = [f"{path}:{line}" for path, line, trails in found if trails]
    assert len(trailing) < TRAILING_SHARE * len(found) or not trailing, (
        f"{len(trailing)} of {len(found)} comments trail code:\n" + "\n".join(trailing)
    )


def test_files_of_the_package_are_short() -> None:
    lines = {path: len(source.splitlines()) for path, source in sources(PACKAGE)}
    long = [f"{path}: {count}" for path, count in lines.items() if count > FILE_LINES]
    assert not long, f"{len(long)} files have more than {FILE_LINES} lines:\n" + "\n".join(long)


def test_readme_is_short() -> None:
    lines = len((ROOT / "README.md").read_text().splitlines())
    assert lines <= README_LINES, f"README.md has {lines} lines, more than {README_LINES}"
