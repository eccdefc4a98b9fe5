"""Measure how many of the demo model's tool calls are exactly right, at the precision it is published in.

    python -m demo.training.calls --wordnet usr/share/wordnet
    python -m demo.training.calls --wordnet usr/share/wordnet --generated --count 500

Questions are in held-out phrasings and about held-out values, like those of ``scores.py``, which scores the weights
before quantization. A call is right if each of its tokens is the most likely one given the right tokens before it,
which is when greedy decoding would have written it. Wrong calls are printed; the last line is JSON.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

import flashmoe_mlx
from demo import MODEL
from demo.training.batches import encode
from demo.training.dataset import SEED, Dataset
from flashmoe_mlx.evaluation.metrics import share


def main() -> None:
    """Score the calls and print the wrong ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--model", type=Path, default=MODEL, help="the model (default: demo/model)")
    parser.add_argument("--count", type=int, default=2000, help="number of questions (default: 2000)")
    parser.add_argument("--generated", action="store_true", help="ask for generated tools, unseen in training")
    parser.add_argument("--training-phrasings", action="store_true", help="ask in phrasings of the training data")
    options = parser.parse_args()
    dataset = Dataset.load(options.wordnet, SEED)
    model, wrapper = flashmoe_mlx.load(str(options.model))[:2]
    # mlx-lm's wrapper cannot be called on a list of texts.
    tokenizer = wrapper._tokenizer
    right = 0
    for number in range(options.count):
        example = dataset.held_out_call(
            number, handwritten=not options.generated, held_out_phrasing=not options.training_phrasings
        )
        ((tokens, mask),) = encode(tokenizer, [example])
        predicted = np.array(mx.argmax(model(mx.array(tokens[None, :-1]))[0], axis=-1))
        # The first masked span is the call, the second the answer to its result.
        start = int(np.argmax(mask))
        end = start + int(np.argmin(mask[start:]))
        wrong = np.flatnonzero(predicted[start - 1 : end - 1] != tokens[start:end])
        right += not len(wrong)
        if len(wrong):
            first = start + wrong[0]
            before, token = tokenizer.decode(tokens[start:first]), tokenizer.decode([predicted[first - 1]])
            print(f"{number}: {example.messages[0]['content']!r} -> {before!r}, then {token!r}", flush=True)
    estimate = share(right, options.count)
    interval = [round(estimate.low, 4), round(estimate.high, 4)]
    print(json.dumps({"right": right, "of": options.count, "interval": interval}))


if __name__ == "__main__":
    main()
