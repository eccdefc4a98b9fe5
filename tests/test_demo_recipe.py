"""The demo model's recipe, with a WordNet of a few words."""

import json
import re
from collections.abc import Iterator
from itertools import islice

import pytest
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from demo.training import dataset, tasks
from demo.training.dataset import Recipe
from demo.training.handwritten_tools import WRITTEN
from demo.training.tools import OPENINGS, REQUESTS
from flashmoe_mlx.tasks import Task, tool_calls

ANIMALS = [f"{a}{b}nimal" for a in "bcdfg" for b in "aeiou"]
THOUGHTS = [f"{a}{b}ea" for a in "bcdfg" for b in "aeiou"]
CITIES = [f"{a}{b}ville" for a in "BCDFG" for b in "aeiou"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("wordnet")
    data, index = ["  1 the licence"], ["  1 the licence"]
    words = [("05", word) for word in ANIMALS] + [("09", word) for word in THOUGHTS]
    for number, (file, word) in enumerate(words, 1):
        data.append(f'{number:08} {file} n 01 {word} 0 000 | the one called {word}; "a {word} came"')
        index.append(f"{word} n 1 0 1 0 {number:08}")
    data.append("90000000 15 n 01 city 0 000 | a large town")
    data += [f"{91000000 + i} 15 n 01 {city} 0 001 @i 90000000 n 0000 | {city}" for i, city in enumerate(CITIES)]
    index.append(f"{CITIES[0].lower()} n 1 1 @ 1 0 91000000")
    for name, lines in {"data.noun": data, "index.noun": index, "cntlist.rev": ["baea%1:09:00:: 1 7"]}.items():
        (folder / name).write_text("\n".join(lines))
    for part in ("verb", "adj"):
        (folder / f"data.{part}").write_text("")
        (folder / f"index.{part}").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "HELD_OUT_SYNSETS", 5)
        patch.setattr(dataset, "HELD_OUT_CITIES", 5)
        return dataset.read(folder, seed=3)


def test_entries(plan: Recipe) -> None:
    words = {entry.word: entry for entry in plan.entries + plan.held_out}
    assert set(words) == {*ANIMALS, *THOUGHTS}  # and no city
    assert words["baea"].line == "baea (noun): the one called baea."
    assert (words["baea"].count, words["banimal"].everyday) == (7, True)
    assert {*plan.pools.cities, *plan.held_out_pools.cities} == set(CITIES)


def test_same_seed_same_dialogue(plan: Recipe) -> None:
    for number in range(20):
        assert plan.tool_dialogue(number) == plan.tool_dialogue(number) != plan.tool_dialogue(number + 1)
        assert plan.chat(number) == plan.chat(number)


def test_held_out_is_never_read(plan: Recipe) -> None:
    assert len(plan.held_out) == len(plan.held_out_pools.cities) == 5
    examples = [write(number) for write in (plan.line, plan.definition, plan.chat) for number in range(200)]
    read = " ".join([e.text for e in examples] + [m["content"] for e in examples for m in e.messages])
    assert all(entry.line in read for entry in plan.entries)
    assert not any(entry.line in read for entry in plan.held_out)
    dialogues = str([plan.tool_dialogue(number).messages for number in range(200)])
    assert not any(city in dialogues for city in plan.held_out_pools.cities)


def test_calls_parse_back(plan: Recipe) -> None:
    """What the template makes of a call is what mlx-lm's parser reads."""
    tokenizer = load_tokenizer(MODEL)
    count = 0
    for example in map(plan.tool_dialogue, range(200)):
        for place, message in enumerate(example.messages):
            if "tool_calls" in message:
                said = example.messages[: place + 1]
                text = tokenizer.apply_chat_template(said, tools=example.tools, tokenize=False)
                call = text.rpartition("<|im_start|>assistant")[2].removesuffix("<|im_end|>\n")
                expected = [each["function"] for each in message["tool_calls"]]
                assert tool_calls(call, example.tools, tokenizer) == expected
                count += 1
    assert count > 100


def test_tasks(plan: Recipe) -> None:
    """They can be read, and the first half puts questions as training does."""
    made = [*islice(tasks.tool_tasks(plan, False), 5), *islice(tasks.tool_tasks(plan, True), 5)]
    assert all(Task.from_json(json.dumps(task)).expect == task["expect"] for task in made)


def test_held_out_phrasings_are_no_training_phrasings() -> None:
    """However they are dressed, letter case and punctuation aside."""

    def expansions(ask: str) -> Iterator[str]:
        found = re.search(r"\[([^\[\]]*)\]", ask)
        if not found:
            yield re.sub(r"[^a-z{}_ ]", "", ask.lower()).strip()
            return
        for choice in found[1].split("|"):
            yield from expansions(ask[: found.start()] + choice + ask[found.end() :])

    openings = ["", *(f"{next(expansions(opening))} " for opening in OPENINGS + REQUESTS)]
    for tool in WRITTEN:
        trained = {asked for ask in tool.asks for asked in expansions(ask)}
        held_out = {asked for ask in tool.held_out_asks for asked in expansions(ask)}
        assert held_out
        assert not held_out & {f"{opening}{asked}" for opening in openings for asked in trained}
