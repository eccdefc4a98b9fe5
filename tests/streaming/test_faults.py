"""With any fault of device or files: the right tokens or one clear error, and then the right tokens again."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

from flashmoe_mlx import evaluate
from flashmoe_mlx.config import SLOTS, Config
from flashmoe_mlx.evaluation import measure as evaluation
from flashmoe_mlx.generation.prompt_cache import save_prompt_cache
from flashmoe_mlx.streaming.read_error import ReadError
from tests.conftest import WriteFamily
from tests.support.faults import HARMFUL, HARMLESS, faults, hurried
from tests.support.oracle import resident, streamed

QUESTIONS = [[(37 * i * i + seed) % 320 for i in range(length)] for seed, length in enumerate([1, 2, 5, 9, 17, 30])]
TOKENS = 5
FILES = ("truncated", "emptied", "written to", "replaced", "removed")


@pytest.fixture(scope="module")
def folder(checkpoint: WriteFamily) -> Path:
    return checkpoint("qwen3_5_moe")


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[list[int]]:
    """The tokens of mlx-lm's own model."""
    model = resident(folder)
    return [answer(model, question) for question in QUESTIONS]


@pytest.fixture(scope="module", autouse=True)
def impatient() -> Iterator[None]:
    with hurried(8):
        yield


# A pool for all layers, a pool for each layer, and a pool with prefetch.
WAYS = [(0, False), (0.5, False), (0, True)]


def load(folder: Path, fraction: float, lookahead: bool, slots: Any = "live") -> nn.Module:
    return streamed(folder, fraction, config=Config(read_timeout=0.3, lookahead=lookahead, slots=slots))


def answer(model: nn.Module, question: list[int], file: Path | None = None) -> list[int]:
    """Return greedy tokens; with ``file``, after a prompt cache was written there and read back."""
    cache = make_prompt_cache(model)
    if file is not None:
        list(generate_step(mx.array(question), model, max_tokens=0, prompt_cache=cache))
        save_prompt_cache(file, cache, {})
        cache, question = load_prompt_cache(str(file)), question[-1:]
    return [int(token) for token, _ in generate_step(mx.array(question), model, max_tokens=TOKENS, prompt_cache=cache)]


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("count", [14, pytest.param(600, marks=pytest.mark.soak)])
def test_faulty_reads_give_the_right_tokens_or_an_error(
    count: int, slots: Any, folder: Path, answers: list[list[int]], tmp_path: Path
) -> None:
    models = [load(folder, *way, slots) for way in WAYS]
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(count):
        chance = random.Random(seed)
        kind = (HARMLESS + HARMFUL)[seed % 7]
        model, number = chance.choice(models), chance.randrange(len(QUESTIONS))
        file = tmp_path / "state.safetensors" if chance.random() < 0.3 and number else None
        # If every call were cut short, no read would end.
        most = 0.1 if kind in ("short", "interrupted") else 1
        with faults(kind, chance.choice([0.001, 0.01, 0.1, most]), seed) as thrown:
            try:
                tokens = answer(model, QUESTIONS[number], file)
                outcomes[kind, "right, with faults" if thrown.count else "right, without"] += 1
            except ReadError as error:
                assert kind in HARMFUL
                assert error.path in str(error) and str(error.offset) in str(error) and "\n" not in str(error)
                assert error.got < error.wanted
                assert file is None or not file.exists() or load_prompt_cache(str(file))
                outcomes[kind, "error"] += 1
            else:
                assert tokens == expected(answers, number, file, model), (seed, kind)
        assert answer(model, QUESTIONS[-1]) == answers[-1], (seed, kind)
        for left in tmp_path.iterdir():
            left.unlink()
    print(*(f"{kind}: {outcome} {n}" for (kind, outcome), n in sorted(outcomes.items())), sep="\n")
    assert sum(outcomes.values()) == count
    assert all(outcomes[kind, "right, with faults"] for kind in HARMLESS)
    assert all(outcomes[kind, "error"] for kind in HARMFUL)


def expected(answers: list[list[int]], number: int, file: Path | None, model: nn.Module) -> list[int]:
    """Return the right tokens. After a prompt cache, the last token of the question is processed twice."""
    return answers[number] if file is None else answer(model, [*QUESTIONS[number], QUESTIONS[number][-1]])


@pytest.mark.parametrize("count", [5, pytest.param(150, marks=pytest.mark.soak)])
def test_files_that_change_end_the_request(count: int, folder: Path, answers: list[list[int]], tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(count):
        chance = random.Random(seed)
        what, number = FILES[seed % len(FILES)], chance.randrange(len(QUESTIONS))
        copy = tmp_path / str(seed)
        shutil.copytree(folder, copy)
        model = load(copy, *chance.choice(WAYS))
        shard = chance.choice(sorted(copy.glob("*.safetensors")))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "preadv", after(chance.randint(1, 200), partial(change, shard, what, chance)))
            try:
                assert answer(model, QUESTIONS[number]) == answers[number], (seed, what)
                outcomes[f"{what}: right"] += 1
            except ReadError as error:
                assert error.path == str(shard)
                assert "truncated" in str(error) or "since the model was loaded" in str(error)
                outcomes[f"{what}: error"] += 1
        shutil.rmtree(copy)
        shutil.copytree(folder, copy)
        assert answer(load(copy, *WAYS[0]), QUESTIONS[number]) == answers[number]
        shutil.rmtree(copy)
    print(outcomes)
    assert all(outcomes[f"{what}: error"] for what in FILES)


def after(reads: int, action: Callable[[], None]) -> Callable[..., int]:
    """Return ``os.preadv``, with an action before one of its calls."""
    preadv, left = os.preadv, [None] * reads

    def read(*call: object) -> int:
        if left:
            left.pop()
            if not left:
                action()
        return preadv(*call)  # type: ignore[arg-type]

    return read


def change(shard: Path, what: str, chance: random.Random) -> None:
    if what == "truncated":
        os.truncate(shard, chance.randrange(shard.stat().st_size))
    elif what == "emptied":
        os.truncate(shard, 0)
    elif what == "written to":
        with shard.open("r+b") as file:
            file.seek(shard.stat().st_size // 2)
            file.write(bytes(shard.stat().st_size // 2))
        # The file system's clock may be too coarse to show the change.
        os.utime(shard, ns=(1, 1))
    elif what == "replaced":
        other = shard.with_name("other")
        other.write_bytes(bytes(shard.stat().st_size))
        other.replace(shard)
    else:
        shard.unlink()


@pytest.mark.parametrize("count", [7, pytest.param(140, marks=pytest.mark.soak)])
def test_evaluation_gives_the_right_figures_or_an_error(
    count: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines written before an error are right, too."""
    monkeypatch.setattr(evaluation, "load", partial(evaluation.load, config=Config(read_timeout=0.3)))
    text = tmp_path / "text.txt"
    text.write_text("A heron waits.")
    half = str(streamed(folder).streaming.experts_nbytes // 2)

    def evaluated(number: int) -> tuple[int, str, list[str]]:
        """Return the exit code, the output, and the lines of the table's file."""
        out, reference = tmp_path / f"{number}.csv", tmp_path / f"{number}.safetensors"
        argv = ["--model", str(folder), "--text", str(text), "--csv", str(out), "--reference-cache", str(reference)]
        code = 0
        try:
            evaluate.main([*argv, "--max-positions", "4", "--experts-per-token", "2", "--ram-budget", "0", half])
        except SystemExit as stop:
            code = stop.code
        lines = out.read_text().splitlines() if out.exists() else []
        assert {file.name for file in tmp_path.iterdir()} <= {text.name, out.name, reference.name}
        for file in (out, reference):
            file.unlink(missing_ok=True)
        said = capsys.readouterr()
        return code, said.err if code else said.out, lines

    _, right, figures = evaluated(count)
    assert len(figures) == 3
    outcomes: Counter[tuple[str, str]] = Counter()
    for seed in range(count):
        chance = random.Random(seed)
        kind = (HARMLESS + HARMFUL)[seed % 7]
        with faults(kind, chance.choice([0.01, 0.03] if kind in HARMLESS else [0.1, 0.3]), seed) as thrown:
            code, said, lines = evaluated(seed)
        outcomes[kind, f"code {code}, {'with' if thrown.count else 'without'} faults"] += 1
        assert lines == figures[: len(lines)], (seed, kind)
        if code == 0:
            assert (said, lines) == (right, figures), (seed, kind)
        else:
            assert kind in HARMFUL
            assert said.startswith("error: ") and str(folder) in said and said.count("\n") == 1
            # The reference's file is not to blame.
            assert "cannot write" not in said
    print(*(f"{kind}: {outcome} {n}" for (kind, outcome), n in sorted(outcomes.items())), sep="\n")
    assert all(outcomes[kind, "code 0, with faults"] for kind in HARMLESS)
    assert all(outcomes[kind, "code 1, with faults"] for kind in HARMFUL)
