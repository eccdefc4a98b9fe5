"""Examples as padded batches of tokens, each with the tokens that count."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from demo.training.dataset import Example
from demo.training.tokenizer import render

LENGTHS = (64, 128, 256, 512, 768)  # every batch has one of these, so that a run meets few shapes
ANSWER = "assistant\n<think>\n"


@dataclass(frozen=True)
class Bucket:
    """Documents padded to one length; ``counts`` marks the tokens that the model has to write."""

    tokens: NDArray[np.int32]
    counts: NDArray[np.bool_]


def counted(tokens: NDArray[np.int32], opening: Sequence[int], closing: int) -> NDArray[np.bool_]:
    """Which tokens are written by the assistant: those after ``opening``, up to and with ``closing``."""
    counts = np.zeros(len(tokens), dtype=bool)
    ends = np.flatnonzero(tokens == closing)
    for start in np.flatnonzero(tokens == opening[-1]) + 1:
        if start >= len(opening) and tuple(tokens[start - len(opening) : start]) == tuple(opening):
            counts[start : ends[np.searchsorted(ends, start)] + 1] = True
    return counts


def encode(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """The tokens of each example and which of them count: all of plain text, the assistant's of a dialogue."""
    opening = tokenizer.encode("<|im_start|>" + ANSWER, add_special_tokens=False)
    texts = [render(tokenizer, example) for example in examples]
    encoded = []
    for example, ids in zip(examples, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        tokens = np.array(ids, dtype=np.int32)
        counts = np.ones(len(ids), bool) if example.text else counted(tokens, opening, tokenizer.eos_token_id)
        encoded.append((tokens, counts))
    return encoded


def bucketed(
    documents: Sequence[tuple[NDArray[np.int32], NDArray[np.bool_]]], pad: int, lengths: Sequence[int] = LENGTHS
) -> list[Bucket]:
    """Documents by length; those longer than the longest are left out."""
    found = []
    for shorter, length in zip((0, *lengths), lengths, strict=False):
        fitting = [document for document in documents if shorter < len(document[0]) <= length]
        if fitting:
            tokens = np.full((len(fitting), length), pad, dtype=np.int32)
            counts = np.zeros((len(fitting), length), dtype=bool)
            for row, (ids, marks) in enumerate(fitting):
                tokens[row, : len(ids)] = ids
                counts[row, : len(ids)] = marks
            found.append(Bucket(tokens, counts))
    return found


def forever(buckets: Sequence[Bucket], size: int, seed: int) -> Iterator[Bucket]:
    """Batches of about ``size`` tokens without end: each from one bucket, and buckets as often as they have tokens."""
    rng = np.random.default_rng(seed)
    weights = np.array([bucket.tokens.size for bucket in buckets], dtype=float)
    orders: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64) for _ in buckets]
    while True:
        chosen = rng.choice(len(buckets), p=weights / weights.sum())
        bucket = buckets[chosen]
        rows = max(1, size // bucket.tokens.shape[1])
        while len(orders[chosen]) < rows:
            orders[chosen] = np.concatenate([orders[chosen], rng.permutation(len(bucket.tokens))])
        taken, orders[chosen] = orders[chosen][:rows], orders[chosen][rows:]
        yield Bucket(bucket.tokens[taken], bucket.counts[taken])


def in_order(bucket: Bucket, size: int) -> Iterator[Bucket]:
    """All of a bucket, about ``size`` tokens at a time."""
    rows = max(1, size // bucket.tokens.shape[1])
    for start in range(0, len(bucket.tokens), rows):
        yield Bucket(bucket.tokens[start : start + rows], bucket.counts[start : start + rows])
