"""Model folders with one fault each."""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
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


def _text(name: str, text: str | bytes) -> Change:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def _entry(name: str, **entries: Any) -> Change:
    """Change entries of a JSON file."""
    return lambda folder: _edit(folder / name, lambda old: old.update(entries))


def _template(template: object) -> Change:
    """Put a chat template in tokenizer_config.json, where older models have it."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        _edit(folder / "tokenizer_config.json", lambda config: config.update(chat_template=template))

    return change


_ASKS = "{folder}/config.json asks for code to be run: %s. If you trust this model's authors, pass "
_ASKS += "trust_remote_code=True or --trust-remote-code; else use another copy of the model"
_PLACE = "{folder}/" + INDEX + " names the file %r: it may only name files in its own folder"
_OUT = "{folder}/%s is a link to {parent}/%s, outside the model folder: replace it by the file"
_NO_FILE = "{folder}/%s is not a file: download it again"
_BROKEN = "{folder}/config.json is damaged (%s): download it again"
_DAMAGED = "{folder}/%s is damaged (%s): download it again"
_NO_OBJECT = "it is not a JSON object"
_NOT_UTF8 = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
_CUT_OFF = "Expecting value: line 1 column 6 (char 5)"
_BUILD = f"mlx-lm {version('mlx-lm')} cannot build {{folder}} from its config.json: %s. Update mlx-lm, or download the "
_BUILD += "folder again"
_LATER = (
    f"{{folder}}/tokenizer.json cannot be read by tokenizers {version('tokenizers')} (%s): update transformers, or "
)
_LATER += "download it again"
_UNKNOWN = (
    f"{{folder}}/tokenizer_config.json: mlx-lm {version('mlx-lm')} has no %s %r: update mlx-lm or remove the entry"
)
_TOKENIZER = "transformers cannot load the tokenizer with {folder}/%s (%s): download it again"
_SYNTAX = "{folder}/%s: the chat template has a syntax error (%s): download it again"

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
    "model_type that is a path": (_config(model_type="../evil"), _BUILD % "Model type ../evil not supported."),
    "model_type that is a module of ours": (_config(model_type="..evil"), _BUILD % "Model type ..evil not supported."),
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
        _DAMAGED % ("generation_config.json", _NO_OBJECT),
    ),
    "generation_config.json is a number": (
        _text("generation_config.json", "7"),
        _DAMAGED % ("generation_config.json", _NO_OBJECT),
    ),
    "generation_config.json is no text": (
        _text("generation_config.json", b"\xff"),
        _DAMAGED % ("generation_config.json", _NOT_UTF8),
    ),
    "text_config is a list": (_entry("config.json", text_config=[1]), _BROKEN % "text_config is not an object"),
    "no experts per token": (
        _entry("config.json", num_experts_per_tok=0),
        "config.json of this qwen3_moe has num_experts_per_tok 0: it must be a positive integer, else there are no "
        "experts to stream",
    ),
    "fewer than no experts per token": (
        _entry("config.json", num_experts_per_tok=-1),
        "config.json of this qwen3_moe has num_experts_per_tok -1: it must be a positive integer, else there are no "
        "experts to stream",
    ),
    "width of zero": (_entry("config.json", hidden_size=0), _BUILD % "division by zero"),
    "no heads": (_entry("config.json", num_attention_heads=0), _BUILD % "integer division or modulo by zero"),
    "negative width": (_entry("config.json", hidden_size=-64), _BUILD % "math domain error"),
    "model_type that is no model": (
        _entry("config.json", model_type="cache"),
        _BUILD % "module 'mlx_lm.models.cache' has no attribute 'Model'",
    ),
    "quantization without a group size": (_entry("config.json", quantization={}), _BUILD % "'group_size' is missing"),
    "quantization that is a list": (
        _entry("config.json", quantization=[1]),
        _BUILD % "list indices must be integers or slices, not str",
    ),
    "max_position_embeddings that is a text": (
        _entry("config.json", max_position_embeddings="x"),
        "transformers cannot read {folder}/config.json (Validation error for field 'max_position_embeddings': "
        "TypeError: Field 'max_position_embeddings' expected int, got str (value: 'x')): download it again",
    ),
    # the tokenizer
    **{
        f"{name} {fault}": (_text(name, text), _DAMAGED % (name, reason))
        for name in ("tokenizer.json", "tokenizer_config.json")
        for fault, text, reason in (
            ("is a list", "[]", _NO_OBJECT),
            ("is null", "null", _NO_OBJECT),
            ("is no text", b"\xff\xfe", _NOT_UTF8),
            ("cut off", '{"a":', _CUT_OFF),
        )
    },
    "special_tokens_map.json is a list": (
        _text("special_tokens_map.json", "[]"),
        _DAMAGED % ("special_tokens_map.json", _NO_OBJECT),
    ),
    "added_tokens.json is a list": (_text("added_tokens.json", "[1]"), _DAMAGED % ("added_tokens.json", _NO_OBJECT)),
    "tokenizer.json of a later version": (
        _text("tokenizer.json", '{"version": "2.0"}'),
        _LATER % "Unknown tokenizer version '2.0' at line 1 column 18",
    ),
    "tokenizer.json without a model": (_text("tokenizer.json", "{}"), _LATER % "Model missing. at line 1 column 2"),
    "tool parser that is unknown": (
        _entry("tokenizer_config.json", tool_parser_type="nosuch"),
        _UNKNOWN % ("tool_parser_type", "nosuch"),
    ),
    "tool parser that is a number": (
        _entry("tokenizer_config.json", tool_parser_type=7),
        _UNKNOWN % ("tool_parser_type", "7"),
    ),
    "chat template type that is unknown": (
        _entry("tokenizer_config.json", chat_template_type="nosuch"),
        _UNKNOWN % ("chat_template_type", "nosuch"),
    ),
    "tokenizer class that is a number": (
        _entry("tokenizer_config.json", tokenizer_class=7),
        _TOKENIZER % ("tokenizer_config.json", "'int' object has no attribute 'removesuffix'"),
    ),
    "longest text that is a text": (
        _entry("tokenizer_config.json", model_max_length="long"),
        _TOKENIZER % ("tokenizer_config.json", "'>' not supported between instances of 'int' and 'str'"),
    ),
    "chat template with a syntax error": (
        _text("chat_template.jinja", "{% if %}"),
        _SYNTAX % ("chat_template.jinja", "line 1: Expected an expression, got 'end of statement block'"),
    ),
    "chat template with an unknown filter": (
        _text("chat_template.jinja", "\n{{ messages | nosuch }}"),
        _SYNTAX % ("chat_template.jinja", "line 2: No filter named 'nosuch'."),
    ),
    "chat template in the config with a syntax error": (
        _template("{{ 1"),
        _SYNTAX % ("tokenizer_config.json", "line 1: unexpected end of template, expected 'end of print statement'."),
    ),
    "chat template that is a number": (
        _template(7),
        _DAMAGED % ("tokenizer_config.json", "the chat template is not a text"),
    ),
    "chat template that is no text": (
        _text("chat_template.jinja", b"\xff{{ 1 }}"),
        _TOKENIZER % ("chat_template.jinja", _NOT_UTF8),
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
