"""Encodes examples as tokens with a loss mask, and groups them into padded batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from demo.training.dataset import Example
from demo.training.tokenizer import TURN_START, render

# Token ids and loss mask of one example, both [tokens].
Document = tuple[NDArray[np.int32], NDArray[np.bool_]]

# Every batch is padded to one of these lengths, so that a run compiles and allocates for few shapes.
LENGTHS = (64, 128, 256, 512, 768)
_ASSISTANT_HEADER = f"{TURN_START}assistant\n<think>\n"


@dataclass(frozen=True)
class Bucket:
    """Documents padded to one length. A batch is a small bucket.

    Attributes:
        tokens (NDArray[np.int32]): Token ids, ``[documents, length]``.
        loss_mask (NDArray[np.bool_]): Marks the tokens that the model has to predict, ``[documents, length]``.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Document]:
    """Encode examples; the loss mask has all tokens of plain text, and of a dialogue those of the assistant."""
    header = tokenizer.encode(_ASSISTANT_HEADER, add_special_tokens=False)
    texts = [render(tokenizer, example) for example in examples]
    documents = []
    for example, ids in zip(examples, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        tokens = np.array(ids, dtype=np.int32)
        mask = np.ones(len(ids), bool) if example.text else _assistant_mask(tokens, header, tokenizer.eos_token_id)
        documents.append((tokens, mask))
    return documents


def _assistant_mask(tokens: NDArray[np.int32], header: Sequence[int], end: int) -> NDArray[np.bool_]:
    """Mark the tokens after each ``header``, up to and including the next ``end``."""
    mask = np.zeros(len(tokens), dtype=bool)
    ends = np.flatnonzero(tokens == end)
    for start in np.flatnonzero(tokens == header[-1]) + 1:
        if start >= len(header) and tuple(tokens[start - len(header) : start]) == tuple(header):
            mask[start : ends[np.searchsorted(ends, start)] + 1] = True
    return mask


def group_by_length(documents: Sequence[Document], pad: int, lengths: Sequence[int] = LENGTHS) -> list[Bucket]:
    """Pad each document to the next of ``lengths``; drop those longer than the last."""
    buckets = []
    for shorter, length in zip((0, *lengths), lengths, strict=False):
        fitting = [document for document in documents if shorter < len(document[0]) <= length]
        if fitting:
            tokens = np.full((len(fitting), length), pad, dtype=np.int32)
            loss_mask = np.zeros((len(fitting), length), dtype=bool)
            for row, (ids, mask) in enumerate(fitting):
                tokens[row, : len(ids)] = ids
                loss_mask[row, : len(ids)] = mask
            buckets.append(Bucket(tokens, loss_mask))
    return buckets


def random_batches(buckets: Sequence[Bucket], size: int, seed: int) -> Iterator[Bucket]:
    """Yield batches of about ``size`` tokens without end.

    Each batch comes from one bucket, drawn in proportion to the tokens in it. A bucket gives all of its documents, in
    random order, before it repeats one.
    """
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
        yield Bucket(bucket.tokens[taken], bucket.loss_mask[taken])


def sequential_batches(bucket: Bucket, size: int) -> Iterator[Bucket]:
    """Yield a bucket once, in batches of about ``size`` tokens."""
    rows = max(1, size // bucket.tokens.shape[1])
    for start in range(0, len(bucket.tokens), rows):
        yield Bucket(bucket.tokens[start : start + rows], bucket.loss_mask[start : start + rows])
