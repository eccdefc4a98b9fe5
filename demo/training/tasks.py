"""Questions for the demo model, and a text to read, for flashmoe_mlx.evaluate.

    python -m demo.training.tasks --wordnet usr/share/wordnet

writes ``demo/tasks.jsonl``: 100 words of the training set to define, and 100 questions whose first answer is one call
of a tool, half of them in phrasings of the training set and half in held-out ones, by turns of a written tool and of a
made-up one. Cities in them are held out. ``demo/text.txt`` has dictionary entries of the training set, which the model
knows by heart, so that what quantisation damages shows; each ends as in training, with the token for a text's end.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

from demo import MODEL
from demo.training import dataset
from demo.training.dataset import SEED, Recipe
from demo.training.tokenizer import PAD
from demo.training.wordnet import Entry

DEMO = MODEL.parent
RECALL, CALLS, LINES = 100, 100, 100
_SCORED = 10**6  # training scores calls from number 0 on, and never gets this far


def recall_tasks(plan: Recipe) -> Iterator[dict[str, Any]]:
    """Words of the training set, spread over the alphabet."""
    for entry in _spread(plan, RECALL, 0):
        question, answer = dataset.asked(entry)
        yield {"kind": "recall", "messages": [question], "expect": answer["content"]}


def tool_tasks(plan: Recipe, held_out: bool) -> Iterator[dict[str, Any]]:
    """Any number of questions that one call answers, in held-out phrasings or in those of the training set."""
    for number in count(_SCORED):
        dialogue = plan.call(number, written=number % 2 == 0, phrasing=held_out)
        question, call = dialogue.messages[:2]
        expected = call["tool_calls"][0]["function"]
        yield {"kind": "tool", "messages": [question], "tools": dialogue.tools, "expect": expected}


def text(plan: Recipe) -> str:
    """Entries of the training set, other ones than the tasks ask for."""
    return "".join(entry.line + PAD for entry in _spread(plan, LINES, 1))


def _spread(plan: Recipe, number: int, start: int) -> list[Entry]:
    return plan.entries[start :: len(plan.entries) // number][:number]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    plan = dataset.read(parser.parse_args().wordnet, SEED)
    tasks = list(recall_tasks(plan))
    for held_out in (False, True):
        tasks += islice(tool_tasks(plan, held_out), CALLS // 2)
    (DEMO / "tasks.jsonl").write_text("".join(f"{json.dumps(task)}\n" for task in tasks))
    (DEMO / "text.txt").write_text(text(plan))


if __name__ == "__main__":
    main()
