"""A saved prompt continues as if it had not been saved, and its file is whole or not there."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache
from mlx_lm.models.cache import save_prompt_cache as mlx_save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from flashmoe_mlx import cache_prompt, generate
from flashmoe_mlx.generation import prompt_cache
from flashmoe_mlx.generation.kv_cache import RotatingKVCache
from flashmoe_mlx.generation.prompt_cache import RestoredPrompt
from flashmoe_mlx.model import budget
from tests.conftest import WriteFamily
from tests.support.flags import STREAMING, flags
from tests.support.oracle import resident, streamed

MANUAL = "The heron is a bird that stands in shallow water and waits. It eats fish, and it is patient about it."
QUESTION = " And what is a crane?"


@pytest.fixture(autouse=True)
def tiny_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pool half the experts of one layer, so that a prompt takes several waves."""
    monkeypatch.setattr(budget, "_SHARED_SLOTS", 8)


@pytest.fixture(scope="module")
def folder(checkpoint: WriteFamily) -> Path:
    """Return a Qwen3.5-MoE, which has GatedDeltaNet layers and an attention layer."""
    return checkpoint("qwen3_5_moe")


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a prompt that was processed in chunks of 7."""
    return save(folder, tmp_path_factory.mktemp("cache") / "manual.safetensors", "--prefill-step-size", "7")


def save(folder: Path, file: Path, *argv: str) -> Path:
    cache_prompt.main(["--model", str(folder), "--prompt", MANUAL, "--prompt-cache-file", str(file), *argv])
    return file


def resume(capsys: pytest.CaptureFixture[str], file: Path, *argv: str) -> str:
    capsys.readouterr()
    command = ["--prompt-cache-file", str(file), "--prompt", QUESTION, "--max-tokens", "12", "--verbose", "False"]
    generate.main([*command, *argv])
    return capsys.readouterr().out


def read_manual(model: nn.Module, tokenizer: TokenizerWrapper) -> list[Any]:
    """Return the cache after the prompt, as mlx-lm's command computes it."""
    messages = [{"role": "user", "content": MANUAL}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    # Several chunks.
    assert len(prompt) > 14
    cache = make_prompt_cache(model)
    assert list(generate_step(mx.array(prompt), model, max_tokens=0, prefill_step_size=7, prompt_cache=cache)) == []
    return cache


def question_logits(model: nn.Module, cache: list[Any]) -> mx.array:
    """Return the logits of a question and of 12 greedy tokens, one position per row."""
    tokens, rows = mx.array([[5, 6, 7]]), []
    for _ in range(13):
        rows.append(model(tokens, cache=cache)[0])
        tokens = rows[-1][-1:].argmax(-1)[None]
    return mx.concatenate(rows)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_moe"])
def test_a_restored_prompt_has_the_same_logits_bit_for_bit(
    checkpoint: WriteFamily, family: str, tmp_path: Path
) -> None:
    folder = checkpoint(family)
    file = save(folder, tmp_path / "manual.safetensors", "--prefill-step-size", "7")
    tokenizer = load_tokenizer(folder)
    model, oracle = streamed(folder), resident(folder)
    actual = question_logits(streamed(folder), RestoredPrompt.load(str(file)).cache)
    assert mx.array_equal(actual, question_logits(model, read_manual(model, tokenizer)))
    assert mx.array_equal(actual, question_logits(oracle, read_manual(oracle, tokenizer)))
    # The manual makes a difference.
    assert not mx.array_equal(actual, question_logits(oracle, make_prompt_cache(oracle)))


def test_generate_continues_what_cache_prompt_saved(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path
) -> None:
    tokenizer, oracle = load_tokenizer(folder), resident(folder)
    rest = tokenizer.encode(QUESTION + "<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    cache = read_manual(oracle, tokenizer)
    assert resume(capsys, saved) == mlx_lm.generate(oracle, tokenizer, rest, max_tokens=12, prompt_cache=cache) + "\n"


def test_generate_leaves_out_what_the_saved_prompt_has(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question and the start of the answer are kept, the system prompt is not."""
    prompts: list[str] = []
    monkeypatch.setattr(
        generate, "_generate_silently", lambda _, tokenizer, tokens, **__: prompts.append(tokenizer.decode(tokens))
    )
    end = "<|im_end|>\n<|im_start|>assistant\n"
    resume(capsys, saved)
    resume(capsys, saved, "--system-prompt", "Be brief.")
    resume(capsys, saved, "--prefill-response", "Well,")
    assert prompts == [QUESTION + end, QUESTION + end, f"{QUESTION}{end}Well,"]


def test_generate_refuses_another_quantization_of_the_kv_cache(
    capsys: pytest.CaptureFixture[str], checkpoint: WriteFamily, tmp_path: Path
) -> None:
    kv = ("--kv-bits", "8", "--kv-group-size", "32")
    file = save(checkpoint("qwen3_moe"), tmp_path / "manual", *kv, "--quantized-kv-start", "0")
    assert resume(capsys, file, "--kv-group-size", "32") == resume(capsys, file, *kv)
    assert "pass --kv-group-size 32" in mistake(capsys, file)
    assert "pass --kv-bits 8" in mistake(capsys, file, "--kv-group-size", "32", "--kv-bits", "4")


def test_generate_takes_the_model_from_the_file(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset is of its family, another path of its folder is accepted, and the file's suffix may be left out."""
    text = resume(capsys, saved)
    sampled = resume(capsys, saved, "--config", "exact", "--seed", "1")
    assert resume(capsys, saved, "--config", "exact", "--temp", "0") == text != sampled
    monkeypatch.chdir(folder.parent)
    assert resume(capsys, saved.with_suffix(""), "--model", f"./{folder.name}") == text
    relative = save(Path(folder.name), folder.parent / "relative.safetensors")
    monkeypatch.chdir("/")
    assert resume(capsys, relative) == text


def test_generate_refuses_another_number_of_experts(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    file = save(folder, tmp_path / "two", "--experts-per-token", "2")
    assert resume(capsys, file, "--experts-per-token", "2")
    assert "was made with experts_per_token 2, and now it is 4" in mistake(capsys, file)


def flip_weight(folder: Path) -> None:
    """Change a byte in place, with the size and the time of modification as they were."""
    weights = min(folder.glob("*.safetensors"))
    status, content = weights.stat(), bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))


def rewrite_weights(folder: Path) -> None:
    """Change the last byte, as training a little more would."""
    weights = min(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_theta"] = 5000.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [flip_weight, rewrite_weights, change_config])
def test_generate_refuses_a_model_that_was_changed_in_place(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    file = save(copy, tmp_path / "manual.safetensors")
    assert resume(capsys, file)
    change(copy)
    assert f"the files of {copy} have changed since {file} was made: create it again" in mistake(capsys, file)


@pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
def test_adapters_that_were_trained_again_are_other_settings(folder: Path, tmp_path: Path, name: str) -> None:
    for file in ("adapters.safetensors", "adapter_config.json"):
        (tmp_path / file).write_text("old")
    model = streamed(folder)
    old = prompt_cache.cache_settings(model, str(tmp_path))
    assert prompt_cache.cache_settings(model, str(tmp_path)) == old != prompt_cache.cache_settings(model, None)
    (tmp_path / name).write_text("new")
    assert prompt_cache.cache_settings(model, str(tmp_path)) != old


def test_generate_continues_a_cache_of_limited_size(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its size is the file's, and so is what the check of memory counts."""
    file, asked = save(folder, tmp_path / "limited", "--max-kv-size", "32"), []
    (layer,) = [layer for layer in RestoredPrompt.load(str(file)).cache if isinstance(layer, RotatingKVCache)]
    assert (layer.max_size, layer.keep, layer.offset) == (32, 4, RestoredPrompt.load(str(saved)).tokens)
    monkeypatch.setattr(generate, "refuse_context", lambda *_, max_kv_size, **__: asked.append(max_kv_size))
    assert resume(capsys, file) == resume(capsys, file, "--max-kv-size", "32") != resume(capsys, saved)
    assert asked == [32, 32, None]
    assert "was made with --max-kv-size 32, and now it is 64" in mistake(capsys, file, "--max-kv-size", "64")
    assert "was made with no --max-kv-size, and now it is 64" in mistake(capsys, saved, "--max-kv-size", "64")


@pytest.mark.parametrize(
    ("family", "argv", "words"),
    [
        ("gpt_oss", ("--kv-bits", "8", "--kv-group-size", "32"), "does not support attention sinks"),
        ("qwen3_5_moe", ("--kv-bits", "8"), "--kv-bits 8 with --kv-group-size 64 does not work with this model"),
        ("qwen3_5_moe", ("--kv-bits", "8", "--kv-group-size", "32", "--max-kv-size", "64"), "leave out --kv-bits or"),
        ("qwen3_5_moe", ("--max-kv-size", "3"), "max_kv_size is 3: it must be at least 5"),
    ],
)
def test_a_kv_cache_that_does_not_work_is_refused_before_the_prompt(
    capsys: pytest.CaptureFixture[str],
    checkpoint: WriteFamily,
    tmp_path: Path,
    family: str,
    argv: tuple[str, ...],
    words: str,
) -> None:
    folder = checkpoint(family)
    capsys.readouterr()
    assert words in failure(capsys, lambda: save(folder, tmp_path / "manual", *argv))
    run = ["--model", str(folder), "--prompt", QUESTION, *argv]
    assert words in failure(capsys, lambda: generate.main(run))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[: len(whole) // 2], "damaged or not a prompt cache"),
        (lambda whole: whole[:-1], "damaged or not a prompt cache"),
        (lambda whole: whole[:5], "damaged or not a prompt cache"),
        (lambda whole: b"", "damaged or not a prompt cache"),
        (lambda whole: b"What is a heron? " * 10, "damaged or not a prompt cache"),
        (lambda whole: whole.replace(b"ArraysCache", b"ParrotCache"), "damaged or not a prompt cache"),
        (lambda whole: whole.replace(b'"0.model"', b'"0.mudel"'), "does not name its model"),
    ],
)
def test_generate_refuses_a_damaged_file(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, content: Any, words: str
) -> None:
    file = tmp_path / "damaged.safetensors"
    file.write_bytes(content(saved.read_bytes()))
    assert words in mistake(capsys, file)


def test_generate_refuses_a_file_of_something_else(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path, tmp_path: Path
) -> None:
    """Weights, a cache saved from Python, other layers, and another model."""
    weights = next(folder.glob("*.safetensors"))
    assert "not a prompt cache" in mistake(capsys, weights)
    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 2, 3, 32)), mx.zeros((1, 2, 3, 32)))
    foreign = tmp_path / "foreign.safetensors"
    mlx_save_prompt_cache(str(foreign), [cache])
    assert "does not name its model" in mistake(capsys, foreign)
    mlx_save_prompt_cache(str(foreign), [cache], {"model": str(folder), "tokenizer_config": "{}"})
    assert "is of 1 layers, and the model has 4" in mistake(capsys, foreign)
    assert f"made with model {folder}, not {tmp_path}" in mistake(capsys, saved, "--model", str(tmp_path))


def test_generate_continues_a_file_of_mlx_lm(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, folder: Path, saved: Path, tmp_path: Path
) -> None:
    """It does not say which weights and how many experts per token it is of, so they are not compared."""
    file = tmp_path / "stock.safetensors"
    mlx_save_prompt_cache(
        str(file),
        read_manual(resident(folder), load_tokenizer(folder)),
        {"model": str(folder), "tokenizer_config": "{}"},
    )
    assert resume(capsys, file) == resume(capsys, saved)
    (record,) = caplog.records
    assert record.getMessage() == f"{file} does not say which weights it was made with: they are not checked"


def test_generate_refuses_a_draft_model_with_a_file(
    capsys: pytest.CaptureFixture[str], folder: Path, saved: Path
) -> None:
    assert "no state of a draft model" in mistake(capsys, saved, "--draft-model", str(folder))


def mistake(capsys: pytest.CaptureFixture[str], file: Path, *argv: str) -> str:
    """Return the one line that the generate command prints."""
    return failure(capsys, lambda: resume(capsys, file, *argv))


def failure(capsys: pytest.CaptureFixture[str], run: Any, code: int = 1) -> str:
    with pytest.raises(SystemExit) as stop:
        run()
    assert stop.value.code == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 or code == 130
    return error


@pytest.mark.parametrize(("interruption", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("disk full"), 1)])
@pytest.mark.parametrize("old", [True, False])
def test_an_interrupted_save_leaves_the_old_file_or_none(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interruption: BaseException,
    code: int,
    old: bool,
) -> None:
    file = tmp_path / "manual.safetensors"
    if old:
        file.write_text("old")

    def write_half(name: str, *_: Any) -> None:
        Path(name).write_text("half")
        raise interruption

    monkeypatch.setattr(prompt_cache.mlx_cache, "save_prompt_cache", write_half)
    failure(capsys, lambda: save(folder, file), code)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * old


def test_a_file_is_on_disk_before_it_has_its_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For each sync: if it was of the folder, and if the file had its name.
    synced: list[tuple[bool, bool]] = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path == tmp_path, (tmp_path / "manual.safetensors").exists()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    save(folder, tmp_path / "manual.safetensors")
    assert synced == [(False, False), (True, True)]


def test_a_file_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_prompt, "streamed_load", lambda *_: pytest.fail("the model is loaded"))
    assert "cannot write" in failure(capsys, lambda: save(folder, tmp_path / "nowhere" / "manual"))
    (tmp_path / "manual.safetensors").mkdir()
    assert "cannot write" in failure(capsys, lambda: save(folder, tmp_path / "manual"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_in_a_terminal_only(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, tmp_path / "manual")
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.partition(":")[0] for line in out.splitlines()] == ["Peak memory", "Saving...", "Experts"]
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    save(folder, tmp_path / "manual")
    assert "Prompt" in terminal.getvalue()


def test_every_flag_of_mlx_lm_is_there() -> None:
    stock, ours = flags(cache_prompt.mlx_lm_parser()), flags(cache_prompt.setup_arg_parser())
    assert stock <= ours
    assert ours - stock == STREAMING | {"--prefill-step-size"}
