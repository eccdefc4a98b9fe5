"""Write the evaluation data of the demo model, for flashmoe_mlx.evaluate.

    python -m demo.training.tasks --wordnet usr/share/wordnet

writes two files. ``demo/tasks.jsonl`` has 100 training words to define and 100 questions that need one call of a tool:
half of them in training phrasings and half in held-out ones, alternating between handwritten and generated tools, about
held-out cities. ``demo/text.txt`` has 100 dictionary entries of the training data, each followed by the end-of-text
token as in training. The model knows them by heart, so that their perplexity shows what quantization damages.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from demo import MODEL
from demo.training.dataset import SEED, Dataset, plain_definition
from demo.training.tokenizer import END_OF_TEXT
from demo.training.wordnet import Entry

RECALL_TASKS, CALL_TASKS, ENTRIES = 100, 100, 100
# training/scores.py uses the calls from 0 to 1,999, so that these are others.
_FIRST_CALL = 10**6


def recall_tasks(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """Yield questions about training words, spread over the alphabet."""
    for entry in _spread(dataset, RECALL_TASKS, 0):
        question, answer = plain_definition(entry)
        yield {"kind": "recall", "messages": [question], "expect": answer["content"]}


def tool_tasks(dataset: Dataset, held_out: bool) -> Iterator[dict[str, Any]]:
    """Yield questions that one call answers, without end, in held-out or in training phrasings."""
    for number in count(_FIRST_CALL):
        example = dataset.held_out_call(number, handwritten=number % 2 == 0, held_out_phrasing=held_out)
        question, call = example.messages[:2]
        expected = call["tool_calls"][0]["function"]
        yield {"kind": "tool", "messages": [question], "tools": example.tools, "expect": expected}


def text(dataset: Dataset) -> str:
    """Return entries of the training data, none of which is in the recall tasks."""
    return "".join(entry.line + END_OF_TEXT for entry in _spread(dataset, ENTRIES, 1))


def _spread(dataset: Dataset, number: int, start: int) -> list[Entry]:
    return dataset.entries[start :: len(dataset.entries) // number][:number]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    dataset = Dataset.load(parser.parse_args().wordnet, SEED)
    tasks = list(recall_tasks(dataset))
    for held_out in (False, True):
        tasks += islice(tool_tasks(dataset, held_out), CALL_TASKS // 2)
    folder = MODEL.parent
    (folder / "tasks.jsonl").write_text("".join(f"{json.dumps(task)}\n" for task in tasks))
    (folder / "text.txt").write_text(text(dataset))


if __name__ == "__main__":
    main()
