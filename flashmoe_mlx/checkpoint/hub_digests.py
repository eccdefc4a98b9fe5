"""What the Hugging Face hub says the files of a model are: their SHA-256, or Git's SHA-1 of small ones."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.hf_api import RepoFile

_PIECE = 1 << 24  # bytes
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def downloaded_digests(folder: Path) -> dict[str, str]:
    """The digests that the hub gave with a download, by name of the file. Needs no network.

    The hub's cache calls a file by its digest; a download to a folder keeps it in ``.cache/huggingface/download``.
    (huggingface_hub's own reader of the latter writes locks into the folder, so it is not used.)
    """
    digests = {}
    for file in folder.iterdir():
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        if file.is_symlink() and file.resolve().parent.name == "blobs":
            digest = file.resolve().name
        elif file.is_file() and note.is_file():
            _, digest, *_ = [*note.read_text(errors="replace").splitlines(), "", ""]  # the commit comes first
        else:
            continue
        if _DIGEST.fullmatch(digest):
            digests[file.name] = digest
    return digests


def hub_digests(repo: str, revision: str | None, folder: Path) -> dict[str, str]:
    """The digests that the hub publishes now of the files that a folder has, by name.

    Raises:
        OSError: the hub cannot be reached, or has no such repository.
    """
    names = [file.name for file in folder.iterdir() if file.is_file()]
    try:
        entries = HfApi().get_paths_info(repo, names, revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(
            f"the Hugging Face hub tells nothing of {repo} ({reason}). Check the name and the network"
        ) from error
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def differing(folder: Path, digests: Mapping[str, str], advance: Callable[[int], object]) -> list[str]:
    """The names of files whose bytes are not what the hub published.

    Args:
        folder (Path): has the files.
        digests (Mapping[str, str]): by name.
        advance (Callable): told how many bytes more have been read.

    Raises:
        OSError: a file cannot be read.
    """
    return [name for name, digest in digests.items() if _digest(folder / name, len(digest) == 40, advance) != digest]


def _digest(path: Path, as_git: bool, advance: Callable[[int], object]) -> str:
    # Git's own of a small file: SHA-1 of its kind, its size, and its bytes.
    total = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if as_git else hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            total.update(piece)
            advance(len(piece))
    return total.hexdigest()
