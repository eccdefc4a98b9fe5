"""The generate command as its users meet it: output, flags, errors, Ctrl-C and closed pipes."""

import argparse
import io
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_tokenizer

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from benchmarks.exact import load_resident
from flashmoe_mlx import generate
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.model import budget, prefill
from flashmoe_mlx.ops.dispatch import Backend
from tests.conftest import WriteFamily
from tests.support.flags import STREAMING, flags
from tests.support.oracle import streamed

STATISTICS = re.compile(
    r"Prompt: \d+ tokens, \d+\.\d{3} tokens-per-sec\n"
    r"Generation: \d+ tokens, \d+\.\d{3} tokens-per-sec\n"
    r"Peak memory: \d+\.\d{3} GB\n"
    r"Experts: (?P<share>\d+\.\d)% from memory, \d+\.\d\d GB read, \d+\.\d GB/s(?P<rest>.*)\n$"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3.5-MoE with tokenizer and chat template."""
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    config = qwen3_5_moe(layers=4, experts=16, top_k=4, hidden=128, intermediate=128, vocab=400)
    write_checkpoint(path, config, quantization={"group_size": 64, "bits": 4})
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    generate.main([*argv, "--prompt", "What is a heron?", "--max-tokens", "12"])
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that an error is."""
    with pytest.raises(SystemExit) as stop:
        run(capsys, *argv)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("backend", [Backend.REFERENCE], ids=["reference"], indirect=True)
def test_output_is_that_of_mlx_lm_and_a_line_about_experts(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = run(capsys, "--model", str(folder))
    model, tokenizer = load_resident(str(folder)), load_tokenizer(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a heron?"}], add_generation_prompt=True
    )
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
    head, text, statistics = out.split("=" * 10 + "\n", 2)
    assert (head, text) == ("", expected + "\n")
    match = STATISTICS.fullmatch(statistics)
    assert match and match["rest"] == ""


def test_fewer_experts_show_in_the_statistics(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    half = streamed(folder).streaming.experts_nbytes // 2
    out = run(capsys, "--model", str(folder), "--experts-per-token", "2", "--ram-budget", str(half))
    match = STATISTICS.search(out)
    assert match and match["rest"] == ", 2 experts per token instead of 4"
    assert float(match["share"]) > 0


def test_a_budget_for_all_experts_shows_in_the_statistics_only(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    text, statistics = run(capsys, "--model", str(folder), "--ram-budget", "1GB").rsplit("=" * 10 + "\n", 1)
    assert text == run(capsys, "--model", str(folder)).rsplit("=" * 10 + "\n", 1)[0]
    assert statistics.endswith("\nExperts: all in memory\n")


def test_a_preset_sets_sampling_and_flags_win(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    greedy = run(capsys, "--model", str(folder), "--verbose", "False")
    sampled = run(capsys, "--model", str(folder), "--verbose", "False", "--config", "exact", "--seed", "1")
    overridden = run(capsys, "--model", str(folder), "--verbose", "False", "--config", "exact", "--temp", "0")
    assert greedy == overridden != sampled


def test_a_toml_file_sets_streaming(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('experts_per_token = 3\nram_budget = "50MB"\n')
    assert "3 experts per token instead of 4" in run(capsys, "--model", str(folder), "--config", str(config))


def test_prefill_chunks_do_not_change_the_text(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their size is what memory allows or what the user says."""
    steps: list[int] = []

    def shown(self: PromptProgress, processed: int, total: int) -> None:
        steps.append(processed)

    monkeypatch.setattr(PromptProgress, "__call__", shown)
    whole = run(capsys, "--model", str(folder), "--verbose", "False")
    first, read, total = steps
    assert (first, read) == (0, total - 1)
    steps.clear()
    assert run(capsys, "--model", str(folder), "--verbose", "False", "--prefill-step-size", "5") == whole
    assert steps[:3] == [0, 5, 10]
    steps.clear()
    monkeypatch.setattr(prefill, "_CHUNKS", (4, 4))
    assert run(capsys, "--model", str(folder), "--verbose", "False") == whole
    assert steps[:3] == [0, 4, 8]


def test_every_flag_of_mlx_lm_is_there() -> None:
    stock, ours = flags(generate.mlx_lm_parser()), flags(generate.setup_arg_parser())
    assert ours - stock == STREAMING
    assert stock <= ours


def test_every_flag_is_read(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag that a new version of mlx-lm adds is not ignored silently."""
    read: set[str] = set()

    class Recorder(argparse.Namespace):
        def __getattribute__(self, name: str) -> Any:
            read.add(name)
            return super().__getattribute__(name)

    parse = generate.parse
    monkeypatch.setattr(generate, "parse", lambda *args: Recorder(**vars(parse(*args))))
    run(capsys, "--model", str(folder))
    ignored = {"help", "use_default_chat_template"}
    assert {action.dest for action in generate.setup_arg_parser()._actions} - ignored <= read


def test_text_prompts_are_those_of_mlx_lm(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(folder)
    prompts: list[str] = []
    monkeypatch.setattr(
        generate, "_generate_silently", lambda _, tokenizer, tokens, **__: prompts.append(tokenizer.decode(tokens))
    )

    def prompt(*argv: str) -> str:
        generate.main(["--model", str(folder), "--verbose", "False", *argv])
        return prompts.pop()

    user = {"role": "user", "content": "a\n\tb"}
    assert prompt("--prompt", r"a\n\tb") == tokenizer.apply_chat_template(
        [user], tokenize=False, add_generation_prompt=True
    )
    system = {"role": "system", "content": "Be brief."}
    assert prompt("--prompt", r"a\n\tb", "--system-prompt", "Be brief.") == tokenizer.apply_chat_template(
        [system, user], tokenize=False, add_generation_prompt=True
    )
    start = {"role": "assistant", "content": "Well,"}
    assert prompt("--prompt", r"a\n\tb", "--prefill-response", "Well,") == tokenizer.apply_chat_template(
        [user, start], tokenize=False, continue_final_message=True
    )
    assert prompt("--prompt", "plain", "--ignore-chat-template") == "plain"
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert prompt("--prompt", "-", "--ignore-chat-template") == "from stdin"


def test_extra_eos_tokens_end_the_text(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    model, tokenizer = streamed(folder), load_tokenizer(folder)
    messages = [{"role": "user", "content": "What is a heron?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    tokens = [each.token for each in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=12)]
    end = tokenizer.convert_ids_to_tokens(tokens[-2])
    shorter = run(capsys, "--model", str(folder), "--verbose", "False", "--extra-eos-token", end)
    assert shorter == tokenizer.decode(tokens[: tokens.index(tokens[-2])]) + "\n"


def test_a_draft_model_does_not_change_the_text(
    capsys: pytest.CaptureFixture[str], checkpoint: WriteFamily, folder: Path
) -> None:
    """It may even be the model itself."""
    model = str(checkpoint("qwen3_moe"))
    # mlx-lm prints when it quantizes.
    capsys.readouterr()
    text = run(capsys, "--model", model, "--verbose", "False")
    assert (
        run(capsys, "--model", model, "--verbose", "False", "--draft-model", model, "--num-draft-tokens", "2") == text
    )
    assert "a draft model must have the same tokenizer" in fail(capsys, "--model", model, "--draft-model", str(folder))


@pytest.mark.parametrize(
    ("family", "argv", "words"),
    [
        ("qwen3_moe", ("--max-kv-size", "64"), "leave out --max-kv-size or --draft-model"),
        ("gpt_oss", (), "has a state that tokens cannot be removed from"),
        ("qwen3_5_moe", (), "has a state that tokens cannot be removed from"),
    ],
)
def test_a_draft_model_is_refused_where_its_tokens_could_not_be_removed(
    capsys: pytest.CaptureFixture[str], checkpoint: WriteFamily, family: str, argv: tuple[str, ...], words: str
) -> None:
    """A full sliding window would stay as it is, without an error of mlx-lm's."""
    draft = str(checkpoint("qwen3_moe"))
    model = str(checkpoint(family))
    capsys.readouterr()
    assert words in fail(capsys, "--model", model, "--draft-model", draft, *argv)


def test_an_image_becomes_embeddings(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of the same tokens give the same text."""
    text = run(capsys, "--model", str(folder), "--verbose", "False")
    model_class = type(streamed(folder))
    monkeypatch.setattr(generate, "load_processor", lambda *_: lambda text, images: (text, mx.array(images[0])))
    monkeypatch.setattr(generate, "_read_images", lambda files: [np.zeros(len(file)) for file in files])

    def embed_inputs(self: nn.Module, tokens: mx.array, *, pixel_values: mx.array) -> mx.array:
        assert pixel_values.size == len("heron.png")
        return self.language_model.model.embed_tokens(tokens)

    monkeypatch.setattr(model_class, "embed_inputs", embed_inputs, raising=False)
    assert run(capsys, "--model", str(folder), "--verbose", "False", "--image", "heron.png") == text


def test_images_need_pillow(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "load_processor", lambda *_: lambda text, images: (text, images))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install pillow" in fail(capsys, "--model", str(folder), "--image", "heron.png")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "./nowhere"], "no such folder: nowhere"),
        (["--model", "MODEL", "--ram-budget", "lots"], "not a size: 'lots'"),
        (["--model", "MODEL", "--ram-budget", "900TB"], "choose a ram_budget below"),
        (["--model", "MODEL", "--experts-per-token", "0"], "experts_per_token is 0"),
        (["--model", "MODEL", "--experts-per-token", "17"], "a layer of MODEL has 16 experts"),
        (["--model", "MODEL", "--config", "fastest"], "choose from exact, flash"),
        (["--model", "MODEL", "--config", "nowhere.toml"], "no such config file"),
        (["--model", "MODEL", "--read-threads", "0"], "read_threads is 0"),
        (["--model", "MODEL", "--read-timeout", "0"], "read_timeout is 0.0"),
        (["--model", "MODEL", "--prefill-step-size", "0"], "--prefill-step-size is 0: it must be a positive integer"),
        (["--model", "MODEL", "--image", "x.png"], "MODEL takes no images"),
        (["--model", "MODEL", "--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--model", "MODEL", "--chat-template-config", "[]"], "it must be a JSON object"),
        (["--model", "MODEL", "--chat-template-config", "[1]"], "it must be a JSON object"),
        (["--model", "MODEL", "--chat-template-config", '{"tokenize": true}'], "has tokenize, which this command sets"),
        (["--model", "MODEL", "--chat-template-config", '{"messages": []}'], "has messages, which this command sets"),
        (["--model", "MODEL", "--chat-template-config", '{"chat_template": 7}'], "MODEL/chat_template.jinja rejects"),
        (["--model", "MODEL", "--seed", "-1"], "--seed is -1: it must be from 0 to"),
        (["--model", "MODEL", "--extra-eos-token", "nosuch"], "'nosuch', which is not a token of this model"),
        (["--model", "MODEL", "--extra-eos-token", "400000"], "'400000', which is not a token of this model"),
        (["--model", "MODEL", "--draft-model", "MODEL"], "MODEL has a state that tokens cannot be removed from"),
        (["--model", "MODEL", "--draft-model", "./nowhere"], "no such folder: nowhere"),
        (["--model", "MODEL", "--adapter-path", "./nowhere"], "no such folder of adapters: nowhere"),
        (["--model", "MODEL", "--prompt-cache-file", "nowhere"], "no such prompt cache: nowhere.safetensors"),
    ],
)
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], folder: Path, argv: list[str], words: str) -> None:
    error = fail(capsys, *(arg.replace("MODEL", str(folder)) for arg in argv))
    assert words.replace("MODEL", str(folder)) in error


@pytest.mark.parametrize("count", [0, -2, -100])
def test_a_number_of_tokens_is_positive_or_has_no_limit(
    count: int, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--model", str(folder), "--max-tokens", str(count)])
    assert capsys.readouterr().err == (
        f"error: --max-tokens is {count}: it must be a positive integer, or -1 for no limit\n"
    )


def test_a_draft_model_that_does_not_fit_is_refused(
    capsys: pytest.CaptureFixture[str], checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(checkpoint("qwen3_moe"))
    monkeypatch.setattr(generate, "refuse_excess", lambda nbytes, _: budget.refuse_excess(nbytes + 2**60, 0))
    assert "does not fit at any budget" in fail(capsys, "--model", model, "--draft-model", model)


def test_ctrl_c_ends_a_generation(folder: Path) -> None:
    with start(folder, "--max-tokens", "100000") as process:
        assert process.stdout and process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "\ninterrupted\n")


def test_a_closed_pipe_ends_a_generation_silently(folder: Path) -> None:
    with start(folder, "--max-tokens", "100000") as process:
        assert process.stdout and process.stderr and process.stdout.read(20)
        process.stdout.close()
        assert process.wait(timeout=60) == 1
        assert process.stderr.read() == ""


def start(folder: Path, *argv: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flashmoe_mlx.generate", "--model", str(folder), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("file", "shown"), [(Terminal(), True), (io.StringIO(), False)])
def test_progress_is_shown_in_a_terminal_only(file: io.StringIO, shown: bool, folder: Path) -> None:
    model, tokenizer = streamed(folder), load_tokenizer(folder)
    mlx_lm.generate(
        model, tokenizer, [7] * 50, max_tokens=1, prefill_step_size=8, prompt_progress_callback=PromptProgress(file)
    )
    assert ("Prompt" in file.getvalue()) == shown
    # It is erased at the end.
    assert not file.getvalue().rpartition("\r")[2].strip()


def test_lookahead_and_warm_start_do_not_change_the_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run starts with the experts that were in memory when the last run ended."""
    model = ("--model", str(folder), "--ram-budget", "1MB", "--warm-start", str(tmp_path / "residents.json"))
    plain = run(capsys, "--model", str(folder)).split("Prompt:")[0]
    first = run(capsys, *model, "--lookahead")
    second = run(capsys, *model)
    assert plain == first.split("Prompt:")[0] == second.split("Prompt:")[0]
    assert "prefetched experts used" in first
    shares = [float(STATISTICS.search(each)["share"]) for each in (run(capsys, *model[:4]), second)]
    assert shares[0] < shares[1]
