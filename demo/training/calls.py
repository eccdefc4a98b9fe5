"""How often the demo model's calls of tools are exactly right, at the bits it is shipped with.

    python -m demo.training.calls --wordnet usr/share/wordnet
    python -m demo.training.calls --wordnet usr/share/wordnet --made-up --count 500

Asks questions in held-out phrasings and about held-out values, as ``scores.py`` does of the weights in training: a call
is right if each of its tokens is the likeliest one, which is when greedy decoding would have written it. Wrong ones
are printed. The model is streamed, as anywhere else; the last line is JSON.
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np

import flashmoe_mlx
from demo import MODEL
from demo.training import dataset
from demo.training.batches import encode
from demo.training.dataset import SEED
from flashmoe_mlx.quality import share


def main() -> None:
    """Ask, and count."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--model", type=Path, default=MODEL, help="the model (default: demo/model)")
    parser.add_argument("--count", type=int, default=2000, help="how many questions (default 2000)")
    parser.add_argument("--made-up", action="store_true", help="about tools that training never had")
    parser.add_argument("--familiar", action="store_true", help="in phrasings of training")
    options = parser.parse_args()
    plan = dataset.read(options.wordnet, SEED)
    model, wrapper = flashmoe_mlx.load(str(options.model))
    tokenizer = wrapper._tokenizer
    right = 0
    for number in range(options.count):
        example = plan.call(number, written=not options.made_up, phrasing=not options.familiar)
        ((tokens, counted),) = encode(tokenizer, [example])
        likeliest = np.array(mx.argmax(model(mx.array(tokens[None, :-1]))[0], axis=-1))
        start = int(np.argmax(counted))  # of the call; what else counts follows later
        end = start + int(np.argmin(counted[start:]))
        wrong = np.flatnonzero(likeliest[start - 1 : end - 1] != tokens[start:end])
        right += not len(wrong)
        if len(wrong):
            at = start + wrong[0]
            before, token = tokenizer.decode(tokens[start:at]), tokenizer.decode([likeliest[at - 1]])
            print(f"{number}: {example.messages[0]['content']!r} -> {before!r}, then {token!r}", flush=True)
    estimate = share(right, options.count)
    interval = [round(estimate.low, 4), round(estimate.high, 4)]
    print(json.dumps({"right": right, "of": options.count, "interval": interval}))


if __name__ == "__main__":
    main()
