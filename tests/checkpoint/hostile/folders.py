"""Model folders with one fault each."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from flashmoe_mlx.checkpoint.folder import INDEX

FIRST = "model-00001-of-00003.safetensors"
MARKER = "it-ran"
"""File that the code in a hostile folder would write next to it."""

Change = Callable[[Path], Any]


def _config(**entries: Any) -> Change:
    """Add entries to config.json, and a module to the folder that leaves a marker if it runs."""

    def change(folder: Path) -> None:
        _edit(folder / "config.json", lambda config: config.update(entries))
        _code(folder)

    return change


def _code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / MARKER)!r}, 'w').close()\n")


def _edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    entries = json.loads(file.read_text())
    change(entries)
    file.write_text(json.dumps(entries))


def _places(name: str) -> Change:
    """Let the index name the file ``name`` for a tensor of FIRST."""
    return lambda folder: _edit(folder / INDEX, lambda index: index["weight_map"].update({first_tensor(folder): name}))


def first_tensor(folder: Path) -> str:
    """Return a tensor that the index has in the file FIRST."""
    return min(name for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items() if file == FIRST)


def _twice_in_index(folder: Path) -> None:
    index = folder / INDEX
    index.write_text(index.read_text().replace('"weight_map": {', '"weight_map": {"a": "b", "a": "c", ', 1))


def _link(name: str, target: str) -> Change:
    """Move a file to ``target``, relative to the folder, and leave a link."""

    def change(folder: Path) -> None:
        place = folder / target
        place.parent.mkdir(exist_ok=True)
        (folder / name).rename(place)
        (folder / name).symlink_to(target)

    return change


def _instead(name: str, make: Change) -> Change:
    """Replace a file by something else."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def _stray(folder: Path) -> None:
    mx.save_safetensors(str(folder / "model-extra.safetensors"), {"model.extra": mx.zeros(4)})


_ASKS = "{folder}/config.json asks for code to be run: %s. If you trust this model's authors, pass "
_ASKS += "trust_remote_code=True or --trust-remote-code; else use another copy of the model"
_PLACE = "{folder}/" + INDEX + " names the file %r: it may only name files in its own folder"
_OUT = "{folder}/%s is a link to {parent}/%s, outside the model folder: replace it by the file"
_NO_FILE = "{folder}/%s is not a file: download it again"
_BROKEN = "{folder}/config.json is damaged (%s): download it again"

FOLDERS: dict[str, tuple[Change, str]] = {
    # config.json
    "model_file": (_config(model_file="evil.py"), _ASKS % "model_file is 'evil.py'"),
    "model_file elsewhere": (_config(model_file="/tmp/evil.py"), _ASKS % "model_file is '/tmp/evil.py'"),
    "attention kernel of a repository": (
        _config(_attn_implementation_internal="nobody/evil"),
        _ASKS % "_attn_implementation_internal is 'nobody/evil'",
    ),
    "attention kernel in a nested config": (
        _config(text_config={"attn_implementation": "nobody/evil"}),
        _ASKS % "attn_implementation is 'nobody/evil'",
    ),
    "attention kernel for a part": (
        _config(attn_implementation={"vision_config": "nobody/evil"}),
        _ASKS % "attn_implementation is {{'vision_config': 'nobody/evil'}}",
    ),
    "expert kernel of a repository": (
        _config(_experts_implementation_internal="nobody/evil:x"),
        _ASKS % "_experts_implementation_internal is 'nobody/evil:x'",
    ),
    "kernel_config": (
        _config(kernel_config={"RMSNorm": "nobody/evil:x"}),
        _ASKS % "kernel_config is {{'RMSNorm': 'nobody/evil:x'}}",
    ),
    "use_kernels": (_config(use_kernels=True), _ASKS % "use_kernels is True"),
    "model_type that is a path": (_config(model_type="../evil"), "Model type ../evil not supported."),
    "model_type that is a module of ours": (_config(model_type="..evil"), "Model type ..evil not supported."),
    "config.json nested deeply": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        _BROKEN % "maximum recursion depth exceeded while decoding a JSON array from a unicode string",
    ),
    "config.json cut off": (
        lambda folder: (folder / "config.json").write_text('{"model_type":'),
        _BROKEN % "Expecting value: line 1 column 15 (char 14)",
    ),
    "config.json is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "{folder}/config.json has no model_type: it is not the config of a model",
    ),
    "generation_config.json is a list": (
        lambda folder: (folder / "generation_config.json").write_text("[]"),
        _BROKEN % "'list' object has no attribute 'get'",
    ),
    "config.json links out": (
        _link("config.json", "../elsewhere/config.json"),
        _OUT % ("config.json", "elsewhere/config.json"),
    ),
    "config.json links to itself": (
        _instead("config.json", lambda file: file.symlink_to(file.name)),
        "{folder}/config.json is a link to itself: download it again",
    ),
    "tokenizer links out": (
        _link("tokenizer_config.json", "../elsewhere/x"),
        _OUT % ("tokenizer_config.json", "elsewhere/x"),
    ),
    # the index
    "shard above the folder": (_places("../" + FIRST), _PLACE % ("../" + FIRST)),
    "shard in a folder below": (_places("below/" + FIRST), _PLACE % ("below/" + FIRST)),
    "shard with an absolute path": (_places("/etc/passwd"), _PLACE % "/etc/passwd"),
    "shard with backslashes": (_places("..\\" + FIRST), _PLACE % ("..\\" + FIRST)),
    "shard with a NUL": (_places("model\0.safetensors"), _PLACE % "model\0.safetensors"),
    "shard that is two dots": (_places(".."), _PLACE % ".."),
    "shard that is a dot": (_places("."), _PLACE % "."),
    "shard without a name": (_places(""), _PLACE % ""),
    "shard that is missing": (
        _places("model-7.safetensors"),
        "{folder}: model-7.safetensors is in the index but missing: download it again",
    ),
    "shard without the tensor": (
        _places("model-00003-of-00003.safetensors"),
        "{folder}: {tensor} is not in model-00003-of-00003.safetensors, as the index says: download both again",
    ),
    "tensor twice in the index": (
        _twice_in_index,
        "{folder}/" + INDEX + " is damaged (ValueError(\"the name 'a' occurs twice\")): download it again",
    ),
    "index links out": (_link(INDEX, "../elsewhere/index"), _OUT % (INDEX, "elsewhere/index")),
    "index links to nothing": (
        _instead(INDEX, lambda file: file.symlink_to("nothing")),
        "{folder}/" + INDEX + " is a broken link: download it again",
    ),
    "index is a folder": (_instead(INDEX, Path.mkdir), _NO_FILE % INDEX),
    "tensor that is not in the index": (
        _stray,
        "{folder}: model-extra.safetensors holds model.extra, which is not in the index: remove the stray file",
    ),
    # shards
    "shard links out": (_link(FIRST, "../elsewhere/x"), _OUT % (FIRST, "elsewhere/x")),
    "shard links to another repository's blob": (_link(FIRST, "../blobs/x"), _OUT % (FIRST, "blobs/x")),
    "shard links to a device": (
        _instead(FIRST, lambda file: file.symlink_to("/dev/zero")),
        "{folder}/" + FIRST + " is a link to /dev/zero, outside the model folder: replace it by the file",
    ),
    "shard links to nothing": (
        _instead(FIRST, lambda file: file.symlink_to("nothing")),
        "{folder}/" + FIRST + " is a broken link: download it again",
    ),
    "shard is a folder": (_instead(FIRST, Path.mkdir), _NO_FILE % FIRST),
    "shard is a pipe": (_instead(FIRST, lambda file: os.mkfifo(file)), _NO_FILE % FIRST),
}
"""By the fault: the change to a sound folder, and the message that it is refused with."""
