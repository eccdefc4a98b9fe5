"""Digests that the Hugging Face Hub published of a model's files: SHA-256, or Git's SHA-1 of small ones."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from flashmoe_mlx.checkpoint.hub_errors import one_line_hub_errors

_READ_NBYTES = 1 << 24
_DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")


def downloaded_digests(folder: Path) -> dict[str, str]:
    """Return the digests that the hub gave with a download, by the name of the file. Needs no network.

    The hub's cache names a file by its digest, and a download to a folder keeps digests in
    ``.cache/huggingface/download``. huggingface_hub's own function for the latter writes lock files to the folder.
    """
    digests = {}
    for file in folder.iterdir():
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        if file.is_symlink() and file.resolve().parent.name == "blobs":
            digest = file.resolve().name
        elif file.is_file() and note.is_file():
            # The commit, then the digest.
            _, digest, *_ = [*note.read_text(errors="replace").splitlines(), "", ""]
        else:
            continue
        if _DIGEST.fullmatch(digest):
            digests[file.name] = digest
    return digests


def hub_digests(repo: str, revision: str | None, folder: Path) -> dict[str, str]:
    """Return the digests that the hub publishes now of the files that a folder has, by the name of the file.

    Raises:
        OSError: The hub cannot be reached, or has no such repository.
    """
    names = [file.name for file in folder.iterdir() if file.is_file()]
    with one_line_hub_errors(f"could not fetch file hashes of {repo} from the Hugging Face Hub"):
        entries = HfApi().get_paths_info(repo, names, revision=revision)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def mismatched_files(folder: Path, digests: Mapping[str, str], advance: Callable[[int], object]) -> list[str]:
    """Return the names of files whose bytes are not what the hub published.

    Args:
        folder (Path): The folder that has the files.
        digests (Mapping[str, str]): Published digests, by the name of the file.
        advance (Callable): Called with the number of bytes read since the last call.

    Raises:
        OSError: A file cannot be read.
    """
    return [name for name, digest in digests.items() if _digest(folder / name, len(digest) == 40, advance) != digest]


def _digest(path: Path, as_git: bool, advance: Callable[[int], object]) -> str:
    # Git's digest of a small file is the SHA-1 of its kind, its size and its bytes.
    total = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if as_git else hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_READ_NBYTES):
            total.update(piece)
            advance(len(piece))
    return total.hexdigest()
