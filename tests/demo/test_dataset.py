"""The demo model's training data, generated from a WordNet of a few words."""

import json
import random
import re
from collections.abc import Iterator
from itertools import islice

import pytest
from mlx_lm.utils import load_tokenizer

from demo import MODEL
from demo.talk import TOOL
from demo.training import tasks
from demo.training.dataset import Dataset
from demo.training.handwritten_tools import HANDWRITTEN_TOOLS
from demo.training.tools import OPENINGS, REQUESTS
from flashmoe_mlx.evaluation.tasks import Task, tool_calls

ANIMALS = [f"{a}{b}nimal" for a in "bcdfg" for b in "aeiou"]
THOUGHTS = [f"{a}{b}ea" for a in "bcdfg" for b in "aeiou"]
CITIES = [f"{a}{b}ville" for a in "BCDFG" for b in "aeiou"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("wordnet")
    data, index = ["  1 the license"], ["  1 the license"]
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
        patch.setattr("demo.training.dataset.HELD_OUT_SYNSETS", 5)
        patch.setattr("demo.training.dataset.HELD_OUT_CITIES", 5)
        return Dataset.load(folder, seed=3)


def test_entries_are_words_and_no_cities(dataset: Dataset) -> None:
    words = {entry.word: entry for entry in dataset.entries + dataset.held_out}
    assert set(words) == {*ANIMALS, *THOUGHTS}
    assert words["baea"].line == "baea (noun): the one called baea."
    assert (words["baea"].count, words["banimal"].everyday) == (7, True)
    assert {*dataset.sampler.cities, *dataset.held_out_sampler.cities} == set(CITIES)


def test_same_seed_same_dialogue(dataset: Dataset) -> None:
    for number in range(20):
        assert dataset.tool_dialogue(number) == dataset.tool_dialogue(number) != dataset.tool_dialogue(number + 1)
        assert dataset.chat(number) == dataset.chat(number)


def test_held_out_is_never_read(dataset: Dataset) -> None:
    assert len(dataset.held_out) == len(dataset.held_out_sampler.cities) == 5
    examples = [
        generate(number)
        for generate in (dataset.plain_entry, dataset.definition, dataset.chat)
        for number in range(200)
    ]
    read = " ".join([e.text for e in examples] + [m["content"] for e in examples for m in e.messages])
    assert all(entry.line in read for entry in dataset.entries)
    assert not any(entry.line in read for entry in dataset.held_out)
    dialogues = str([dataset.tool_dialogue(number).messages for number in range(200)])
    assert not any(city in dialogues for city in dataset.held_out_sampler.cities)


def test_calls_parse_back(dataset: Dataset) -> None:
    """mlx-lm's parser reads the calls that the template renders."""
    tokenizer = load_tokenizer(MODEL)
    count = 0
    for example in map(dataset.tool_dialogue, range(200)):
        for position, message in enumerate(example.messages):
            if "tool_calls" in message:
                messages = example.messages[: position + 1]
                text = tokenizer.apply_chat_template(messages, tools=example.tools, tokenize=False)
                call = text.rpartition("<|im_start|>assistant")[2].removesuffix("<|im_end|>\n")
                expected = [each["function"] for each in message["tool_calls"]]
                assert tool_calls(call, example.tools, tokenizer) == expected
                count += 1
    assert count > 100


def test_tasks_can_be_read_back(dataset: Dataset) -> None:
    written = [*islice(tasks.tool_tasks(dataset, False), 5), *islice(tasks.tool_tasks(dataset, True), 5)]
    assert all(Task.from_json(json.dumps(task)).expect == task["expect"] for task in written)


def test_held_out_phrasings_are_no_training_phrasings() -> None:
    """Not even with a greeting or a request in front; case and punctuation do not count."""

    def expansions(phrasing: str) -> Iterator[str]:
        found = re.search(r"\[([^\[\]]*)\]", phrasing)
        if not found:
            yield re.sub(r"[^a-z{}_ ]", "", phrasing.lower()).strip()
            return
        for choice in found[1].split("|"):
            yield from expansions(phrasing[: found.start()] + choice + phrasing[found.end() :])

    openings = ["", *(f"{next(expansions(opening))} " for opening in OPENINGS + REQUESTS)]
    for tool in HANDWRITTEN_TOOLS:
        trained = {text for phrasing in tool.phrasings for text in expansions(phrasing)}
        held_out = {text for phrasing in tool.held_out_phrasings for text in expansions(phrasing)}
        assert held_out
        assert not held_out & {f"{opening}{text}" for opening in openings for text in trained}


def test_talk_offers_a_tool_of_the_training_data() -> None:
    trained = {json.dumps(HANDWRITTEN_TOOLS[0].schema(random.Random(seed))) for seed in range(20)}
    assert json.dumps(TOOL) in trained
