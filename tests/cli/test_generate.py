"""The generate command as its users meet it: output, flags, mistakes, Ctrl-C and closed pipes."""

import io
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx_lm
import pytest
from mlx_lm.utils import load_tokenizer

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from benchmarks.exact import load_resident
from flashmoe_mlx import generate
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.model import context
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
    """A Qwen3.5-MoE with tokenizer and chat template."""
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    config = qwen3_5_moe(layers=4, experts=16, top_k=4, hidden=128, intermediate=128, vocab=400)
    write_checkpoint(path, config, quantization={"group_size": 64, "bits": 4})
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    generate.main([*argv, "--prompt", "What is a heron?", "--max-tokens", "12"])
    return capsys.readouterr().out


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a mistake gets."""
    with pytest.raises(SystemExit) as stop:
        run(capsys, *argv)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_text_and_statistics(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
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


def test_all_in_memory(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    text, statistics = run(capsys, "--model", str(folder), "--ram-budget", "1GB").rsplit("=" * 10 + "\n", 1)
    assert text == run(capsys, "--model", str(folder)).rsplit("=" * 10 + "\n", 1)[0]
    assert statistics.endswith("\nExperts: all in memory\n")


def test_preset_sets_sampling_and_flags_win(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    greedy = run(capsys, "--model", str(folder), "--verbose", "False")
    sampled = run(capsys, "--model", str(folder), "--verbose", "False", "--config", "exact", "--seed", "1")
    overridden = run(capsys, "--model", str(folder), "--verbose", "False", "--config", "exact", "--temp", "0")
    assert greedy == overridden != sampled


def test_toml_file(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.toml"
    config.write_text('experts_per_token = 3\nram_budget = "50MB"\n')
    assert "3 experts per token instead of 4" in run(capsys, "--model", str(folder), "--config", str(config))


def test_chunks(capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is read in chunks as the memory allows or the user says, and gives the same tokens."""
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
    monkeypatch.setattr(context, "_CHUNKS", (4, 4))
    assert run(capsys, "--model", str(folder), "--verbose", "False") == whole
    assert steps[:3] == [0, 4, 8]


def test_every_flag_of_mlx_lm() -> None:
    stock, ours = flags(generate._mlx_generate().setup_arg_parser()), flags(generate.setup_arg_parser())
    assert ours - stock == STREAMING
    assert stock <= ours


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
        (["--model", "MODEL", "--prefill-step-size", "0"], "prefill_step_size is 0"),
        (["--model", "MODEL", "--prompt-cache-file", "nowhere"], "no such prompt cache: nowhere.safetensors"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], folder: Path, argv: list[str], words: str) -> None:
    error = fail(capsys, *(arg.replace("MODEL", str(folder)) for arg in argv))
    assert words.replace("MODEL", str(folder)) in error


def test_ctrl_c(folder: Path) -> None:
    with start(folder, "--max-tokens", "100000") as process:
        assert process.stdout and process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "\ninterrupted\n")


def test_closed_pipe(folder: Path) -> None:
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
def test_progress(file: io.StringIO, shown: bool, folder: Path) -> None:
    """A bar of a long prompt, only where somebody watches."""
    model, tokenizer = streamed(folder), load_tokenizer(folder)
    mlx_lm.generate(
        model, tokenizer, [7] * 50, max_tokens=1, prefill_step_size=8, prompt_progress_callback=PromptProgress(file)
    )
    assert ("Prompt" in file.getvalue()) == shown
    assert not file.getvalue().rpartition("\r")[2].strip()  # and it is wiped off


def test_lookahead_and_warm_start(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither changes the text; what was in memory at the end of a run is there when the next begins."""
    model = ("--model", str(folder), "--ram-budget", "1MB", "--warm-start", str(tmp_path / "residents.json"))
    plain = run(capsys, "--model", str(folder)).split("Prompt:")[0]
    first = run(capsys, *model, "--lookahead")
    second = run(capsys, *model)
    assert plain == first.split("Prompt:")[0] == second.split("Prompt:")[0]
    assert "prefetched experts used" in first
    shares = [float(STATISTICS.search(each)["share"]) for each in (run(capsys, *model[:4]), second)]
    assert shares[0] < shares[1]
