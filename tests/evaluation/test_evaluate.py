"""The evaluation: its arithmetic against numpy, a model against itself, and the command as its users meet it."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tool_parsers import qwen3_coder
from mlx_lm.utils import load_tokenizer

from benchmarks.checkpoints import qwen3_5_moe, write_checkpoint
from benchmarks.exact import load_resident
from flashmoe_mlx import evaluate
from flashmoe_mlx.evaluation.logprobs import LogprobsFile, logprobs
from flashmoe_mlx.evaluation.metrics import Quality, compare, mean, share
from flashmoe_mlx.evaluation.tasks import Task, TaskScores, answer, final, tool_calls
from flashmoe_mlx.model.requantize import expert_bits, requantize
from flashmoe_mlx.ops.dispatch import Backend
from tests.support.oracle import PROMPT, streamed

TEXT = "A heron is a bird that waits in shallow water. Then it moves."
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Qwen3.5-MoE with tokenizer and chat template, in 8 bits."""
    path = tmp_path_factory.mktemp("checkpoints") / "model"
    config = qwen3_5_moe(layers=4, experts=16, top_k=4, hidden=128, intermediate=128, vocab=400)
    write_checkpoint(path, config, quantization={"group_size": 64, "bits": 8})
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> TokenizerWrapper:
    """Return the model's tokenizer with Qwen3-Coder's format of tool calls."""
    plain = load_tokenizer(folder)._tokenizer
    marks = {"tool_call_start": qwen3_coder.tool_call_start, "tool_call_end": qwen3_coder.tool_call_end}
    return TokenizerWrapper(plain, tool_parser=qwen3_coder.parse_tool_call, **marks)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def table(tmp_path: Path, *argv: str) -> list[dict[str, str]]:
    """Return the rows of CSV that a command line writes."""
    evaluate.main([*argv, "--csv", str(tmp_path / "table.csv")])
    with (tmp_path / "table.csv").open() as file:
        return list(csv.DictReader(file))


def fail(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line that an error is."""
    with pytest.raises(SystemExit) as stop:
        evaluate.main(argv)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.integers(2, 50), st.floats(0, 8))
def test_quality_is_what_numpy_computes(seed: int, positions: int, vocabulary: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    p, q = (_log_softmax(spread * random.normal(size=(positions, vocabulary))) for _ in range(2))
    targets = random.integers(vocabulary, size=positions)
    rows = zip(p.astype(np.float32), q.astype(np.float32), targets, strict=True)
    quality = Quality.of([compare(mx.array(a), mx.array(b), int(target)) for a, b, target in rows])
    kld = (np.exp(q) * (q - p)).sum(-1)
    nll, reference_nll = (-each[np.arange(positions), targets] for each in (p, q))
    assert quality.positions == positions
    assert quality.perplexity.value == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    assert quality.perplexity_ratio.value == pytest.approx(np.exp(nll.mean() - reference_nll.mean()), rel=1e-4)
    assert quality.kld.value == pytest.approx(kld.mean(), rel=1e-4, abs=1e-5)
    assert quality.kld_p99 == pytest.approx(np.percentile(kld, 99), rel=1e-4, abs=1e-5)
    same = p.astype(np.float32).argmax(-1) == q.astype(np.float32).argmax(-1)
    assert quality.agreement.value == pytest.approx(same.mean())


def test_tokens_without_probability_add_nothing_or_infinity() -> None:
    half = mx.array([math.log(0.5), math.log(0.5), -math.inf])
    whole = mx.array([0.0, -math.inf, -math.inf])
    assert compare(half, half, 0).kld == 0
    assert compare(half, whole, 0).kld == pytest.approx(math.log(2))
    assert compare(whole, half, 0).kld == math.inf


def test_the_interval_of_a_mean_is_that_of_its_blocks() -> None:
    values = np.random.default_rng(0).normal(size=160)
    blocks = values.reshape(10, 16).mean(-1)
    margin = 1.959964 * blocks.std(ddof=1) / math.sqrt(10)
    assert mean(values) == pytest.approx((values.mean(), values.mean() - margin, values.mean() + margin))
    assert mean([3.0, 3.0]) == (3, 3, 3)
    assert math.isnan(mean([3.0]).low)


def test_the_interval_of_a_mean_holds_the_truth_95_times_in_100() -> None:
    random = np.random.default_rng(0)
    intervals = [mean(random.normal(size=1600)) for _ in range(1000)]
    assert 0.93 < np.mean([each.low <= 0 <= each.high for each in intervals]) < 0.97


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_of_a_share_is_wilsons(successes: int, total: int, low: float, high: float) -> None:
    # The last one is from Newcombe, 1998, Statistics in Medicine 17, 857.
    assert share(successes, total) == pytest.approx((successes / total, low, high), abs=5e-5)


@given(st.integers(1, 10**6), st.floats(0, 1))
def test_a_share_lies_in_its_interval(total: int, part: float) -> None:
    for successes in (0, int(part * total), total):
        value, low, high = share(successes, total)
        assert 0 <= low <= value <= high <= 1


@pytest.mark.parametrize("backend", [Backend.REFERENCE], ids=["reference"], indirect=True)
def test_logprobs_are_those_of_mlx_lm_decoding_one_token_per_step(folder: Path) -> None:
    model = load_resident(str(folder))
    expected = []
    for window in (PROMPT[:8], PROMPT[8:16], PROMPT[16:-1]):
        cache = make_prompt_cache(model)
        logits = mx.stack([model(mx.array([[token]]), cache=cache)[0, 0] for token in window])
        expected.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    actual = mx.stack(list(logprobs(streamed(folder, 0.5), PROMPT, 8)))
    assert actual.dtype == mx.float32
    assert mx.array_equal(actual, mx.concatenate(expected))


def test_the_reference_agrees_with_itself_at_every_budget(tmp_path: Path, folder: Path, text: Path) -> None:
    half = str(streamed(folder).streaming.experts_nbytes // 2)
    base = ("--model", str(folder), "--text", str(text), "--ram-budget", "0", half, "1GB")
    lines = table(tmp_path, *base, "--experts-per-token", "4", "--bits", "8", "--context", "16")
    assert len(lines) == 3
    for line in lines:
        assert (float(line["kld"]), float(line["kld_p99"]), float(line["agreement"])) == (0, 0, 1)
        assert [float(line[f"perplexity_ratio{end}"]) for end in ("", "_low", "_high")] == [1, 1, 1]
        assert line["perplexity"] == lines[0]["perplexity"]


def test_fewer_experts_and_fewer_bits_diverge_from_the_reference(tmp_path: Path, folder: Path, text: Path) -> None:
    pytest.importorskip("matplotlib")
    base = ("--model", str(folder), "--text", str(text), "--cache-dir", str(tmp_path / "copies"))
    plot = tmp_path / "plot.svg"
    lines = table(tmp_path, *base, "--experts-per-token", "4", "2", "--bits", "8", "2", "--plot", str(plot))
    assert [line["bits"] + line["experts_per_token"] for line in lines] == ["84", "82", "24", "22"]
    assert {line["model"] for line in lines} == {"model"}
    assert float(lines[0]["kld"]) == 0
    assert all(float(line["kld"]) > 0 and float(line["agreement"]) < 1 for line in lines[1:])
    assert float(lines[1]["kld_low"]) < float(lines[1]["kld"]) < float(lines[1]["kld_high"])
    assert plot.read_text().startswith("<?xml")


def test_the_reference_may_be_another_checkpoint(tmp_path: Path, folder: Path, text: Path) -> None:
    copy = requantize(folder, 3, tmp_path)
    lines = table(tmp_path, "--model", str(copy), "--reference", str(folder), "--text", str(text))
    assert (lines[0]["bits"], lines[0]["experts_per_token"]) == ("3", "4")
    assert float(lines[0]["kld"]) > 0


def test_copies_change_only_the_experts_and_are_made_once(tmp_path: Path, folder: Path) -> None:
    copy = requantize(folder, 2, tmp_path)
    assert (expert_bits(folder), expert_bits(copy)) == (8, 2)
    before = (copy / "config.json").stat().st_mtime_ns
    assert requantize(folder, 2, tmp_path) == copy
    assert (copy / "config.json").stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [copy]
    original, rounded = (dict(mx.load(str(file))) for file in _shards(folder, copy))
    assert original and all(mx.array_equal(original[name], rounded[name]) for name in original)


def _shards(folder: Path, copy: Path) -> list[Path]:
    """Return files with the weights of both checkpoints that are not experts."""
    paths = []
    for source in (folder, copy):
        weights: dict[str, mx.array] = {}
        for shard in source.glob("model*.safetensors"):
            weights |= {name: array for name, array in mx.load(str(shard)).items() if "switch_mlp" not in name}
        paths.append(source.parent / f"{source.name}-trunk.safetensors")
        mx.save_safetensors(str(paths[-1]), weights)
    return paths


def test_a_reference_is_computed_once_and_used_only_for_its_own_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, text: Path
) -> None:
    cache = tmp_path / "reference.safetensors"
    base = ("--model", str(folder), "--text", str(text), "--reference-cache", str(cache))
    first = table(tmp_path, *base, "--experts-per-token", "4", "2")
    written = cache.stat().st_mtime_ns
    assert mx.load(str(cache))["logprobs"].shape == (int(first[0]["positions"]), 400)
    assert table(tmp_path, *base, "--experts-per-token", "4", "2") == first
    assert cache.stat().st_mtime_ns == written
    assert "is of another context" in fail(capsys, *base, "--context", "8")
    text.write_text(TEXT[1:])
    assert "is of another text" in fail(capsys, *base)
    text.write_text(TEXT)
    cache.write_bytes(cache.read_bytes()[:-100])
    assert "is damaged" in fail(capsys, *base)


def test_an_interrupted_reference_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Any:
        yield mx.zeros(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LogprobsFile.write(tmp_path / "reference.safetensors", {}, rows(), 2)
    assert not list(tmp_path.iterdir())


def test_a_text_from_stdin_becomes_a_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(TEXT))
    evaluate.main(["--model", str(folder), "--text", "-", "--max-positions", "7"])
    out = capsys.readouterr().out
    assert "perplexity" in out and "recall" not in out
    row = next(line for line in out.splitlines() if line.startswith("│    8"))
    assert [cell.strip() for cell in row.split("│")[1:-1]][-4:] == ["1", "0", "0", "100"]


def test_a_model_recalls_its_own_answer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, tokenizer: TokenizerWrapper
) -> None:
    messages = [{"role": "user", "content": "What is a heron?"}]
    own = final(answer(streamed(folder), tokenizer, Task(messages, None, ""), 12), tokenizer)
    tasks = tmp_path / "tasks.jsonl"
    lines = [{"messages": messages, "expect": own, "kind": "recall"}, {"messages": messages, "expect": f"{own}!"}]
    tasks.write_text("\n\n".join(map(json.dumps, lines)))
    found = table(tmp_path, "--model", str(folder), "--tasks", str(tasks), "--max-tokens", "12")
    assert (found[0]["recall"], found[0]["calls_parse"], found[0]["kld"]) == ("0.5", "", "")
    assert "recall, %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, [{"name": "weather", "arguments": {"city": "Oslo"}}]),
        (f"I look.\n{CALL}\n", [{"name": "weather", "arguments": {"city": "Oslo"}}]),
        (CALL + CALL, [{"name": "weather", "arguments": {"city": "Oslo"}}] * 2),
        (CALL.replace("</tool_call>", ""), []),
        (CALL.replace("</function>", ""), []),
        (CALL.replace("weather", "whether"), []),
        (CALL.replace("city>\nOslo", "days>\nfew"), [{"name": "weather", "arguments": {"days": "few"}}]),
        (CALL + "<tool_call>\n", []),
        ("Rain.", []),
    ],
)
def test_tool_calls_are_known_and_complete_or_none(text: str, calls: list[Any], tokenizer: TokenizerWrapper) -> None:
    assert tool_calls(text, TOOLS, tokenizer) == calls


def test_scores_count_calls_that_parse_and_calls_that_are_right(tokenizer: TokenizerWrapper) -> None:
    task = Task([{"role": "user", "content": "?"}], TOOLS, {"name": "weather", "arguments": {"city": "Oslo"}})
    scores = TaskScores.of([task] * 4, [CALL, CALL.replace("Oslo", "Rome"), CALL + CALL, "Rain."], tokenizer)
    assert scores.recall is None
    assert scores.calls_parse == share(3, 4)
    assert scores.calls_right == share(1, 4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ("", "has no tasks"),
        ('{"messages": [{}], "expect": "a", "exspect": "b"}', "no other fields"),
        ('{"messages": [{}]}', "no other fields"),
        ('{"messages": [], "expect": "a"}', "at least one"),
        ('{"messages": [{}], "expect": 3}', "kind must be recall"),
        ('{"messages": [{}], "expect": "a", "kind": "tool"}', "kind must be recall"),
        ('{"messages": [{}], "expect": {"name": "a", "arguments": {}}}', "must have tools"),
        ('{"messages": [{}], "tools": [{}], "expect": {"name": "a"}}', "with name and arguments"),
    ],
)
def test_an_invalid_task_is_refused_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, line: str, message: str
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(line)
    assert message in fail(capsys, "--model", str(folder), "--tasks", str(tasks))


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, folder: Path, text: Path) -> None:
    base = ("--model", str(folder))
    read = (*base, "--text", str(text))
    assert "nothing to measure" in fail(capsys, *base)
    assert fail(capsys, *base, "--text", "/no.txt") == "error: /no.txt: No such file or directory\n"
    assert "trained with 4" in fail(capsys, *read, "--experts-per-token", "2", "5")
    assert "experts_per_token is 0" in fail(capsys, *read, "--experts-per-token", "0")
    assert "not a size" in fail(capsys, *read, "--ram-budget", "much")
    assert "MLX quantizes to" in fail(capsys, *read, "--bits", "7")
    assert "--context is 0: it must be a positive integer" in fail(capsys, *read, "--context", "0")
    assert "cannot write" in fail(capsys, *read, "--csv", str(tmp_path / "none" / "table.csv"))
    assert "No such file" in fail(capsys, *base, "--text", str(tmp_path / "none.txt"))
    text.write_text("")
    assert "the text has 0 tokens" in fail(capsys, *read)
    text.write_bytes(b"\xff\xff\xff")
    assert "not UTF-8" in fail(capsys, *read)
    tasks = tmp_path / "tasks.jsonl"
    task = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "expect": {"name": "a", "arguments": {}}}
    tasks.write_text(json.dumps(task))
    assert "no tool parser" in fail(capsys, *base, "--tasks", str(tasks))
