"""Progress bars of long prompts and large files."""

import sys
from typing import Any, TextIO

from tqdm import tqdm


class PromptProgress:
    """A bar while mlx-lm processes a prompt. It is erased at the end, and not drawn at all outside a terminal.

    It is an mlx-lm ``prompt_progress_callback``.

    Args:
        file (TextIO, optional): Where the bar is drawn. Default: ``sys.stderr``.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stderr
        self._bar: tqdm[Any] | None = None

    def __call__(self, processed: int, total: int) -> None:
        """Show that ``processed`` of ``total`` tokens have been processed."""
        if self._bar is None:
            self._bar = tqdm(total=total, desc="Prompt", unit="tok", leave=False, disable=None, file=self._file)
        self._bar.update(processed - self._bar.n)
        if processed >= total:
            self._bar.close()
            self._bar = None


def bytes_read(total: int, what: str) -> "tqdm[Any]":
    """Return a bar that counts bytes up to ``total``. It is erased when closed, and not drawn outside a terminal."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, leave=False, disable=None)
