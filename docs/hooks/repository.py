"""Links out of docs/, which are files of the repository, so that pages can be read there and as a site.

Drawings of benchmarks/results become part of the site; every other file is linked at the repository.
``<!-- file: NAME -->`` is replaced by the text of a file at the repository's root. A file that does not exist is a
warning, which fails a strict build.
"""

import logging
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_LOG = logging.getLogger("mkdocs.hooks.repository")
_FILE = re.compile(r"^<!-- file: (\S+) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_RELATIVE = re.compile(r"\]\((?![a-z]+:|#)")
_ROOT = Path(__file__).parents[2]
_DRAWINGS = _ROOT / "benchmarks" / "results"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the drawings."""
    for drawing in sorted(_DRAWINGS.glob("*.svg")):
        files.append(File.generated(config, f"figures/{drawing.name}", abs_src_path=str(drawing)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: MkDocsConfig, **_: Any) -> str:
    """Fill in files, and point links to where readers of the site find what they lead to."""

    def found(name: str) -> Path:
        if not (_ROOT / name).exists():
            _LOG.warning("%s needs %s, which is not in the repository", page.file.src_uri, name)
        return _ROOT / name

    def text(match: re.Match[str]) -> str:
        path = found(match[1])
        return _RELATIVE.sub("](../", path.read_text(encoding="utf-8")) if path.is_file() else ""

    def link(match: re.Match[str]) -> str:
        path, anchor = found(match[1]), match[2] or ""
        if path.suffix == ".md" and path.parent == _ROOT / "docs":
            return f"]({path.name}{anchor})"
        if path.suffix == ".svg" and path.parent == _DRAWINGS:
            return f"](figures/{path.name})"
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url.rstrip('/')}/{kind}/main/{match[1].rstrip('/')}{anchor})"

    return _LINK.sub(link, _FILE.sub(text, markdown))
