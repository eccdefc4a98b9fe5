"""Scores of the demo model in training: recall of words, calls of tools, perplexity, and use of experts.

Recall and calls are scored with teacher forcing: an answer is right if each of its tokens is the most likely one given
the right tokens before it, which is when greedy decoding would have written it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, Qwen3_5MoeForCausalLM

from demo.training.batches import Bucket, encode, group_by_length, sequential_batches
from demo.training.dataset import Dataset, Example, plain_definition

_BATCH = 32768
# An expert counts as used if it gets this part of an even share of the tokens.
_USED = 0.1


def scores(
    model: Qwen3_5MoeForCausalLM, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, size: int
) -> dict[str, float]:
    """Score a model on its training data and on held-out data.

    Args:
        model (Qwen3_5MoeForCausalLM): The model.
        tokenizer (PreTrainedTokenizerBase): Its tokenizer.
        dataset (Dataset): The data that it was trained on.
        size (int): The number of calls of each kind, of training words (about) and of held-out words (at most).

    Returns:
        dict[str, float]: Shares of right definitions of training words, with all and with one expert per token; the
        perplexity of held-out and of training entries; shares of right calls in held-out phrasings (of all, of
        handwritten and of generated tools) and in training phrasings, and of right answers; and for the layer where it
        is worst, the share of experts in use and the share of choices that the busiest expert gets.
    """
    entries = dataset.entries[:: len(dataset.entries) // size]
    definitions = _buckets(tokenizer, [Example(plain_definition(entry)) for entry in entries])
    known = _buckets(tokenizer, [Example(text=entry.line) for entry in entries])
    held_out = _buckets(tokenizer, [Example(text=entry.line) for entry in dataset.held_out[:size]])
    handwritten, generated, training_phrasings = (
        _buckets(tokenizer, [dataset.held_out_call(number, *kind) for number in range(size)])
        for kind in ((True, True), (False, True), (True, False))
    )
    use = _expert_use(model, definitions + handwritten + generated)
    of_handwritten, of_generated, of_training_phrasings = (
        [turns for bucket in buckets for turns in _right_turns(model, bucket)]
        for buckets in (handwritten, generated, training_phrasings)
    )
    with _top_k(model, 1):
        recall_top_1 = _recall(model, definitions)
    return {
        "recall": _recall(model, definitions),
        "recall_top_1": recall_top_1,
        "held_out_perplexity": _perplexity(model, held_out),
        "training_perplexity": _perplexity(model, known),
        "held_out_calls_exact": _right_share(of_handwritten + of_generated, 0),
        "held_out_calls_handwritten": _right_share(of_handwritten, 0),
        "held_out_calls_generated": _right_share(of_generated, 0),
        "training_phrasings_calls_exact": _right_share(of_training_phrasings, 0),
        "held_out_answers_exact": _right_share(of_handwritten + of_generated, -1),
        "experts_used": float(np.min((use > _USED / use.shape[1]).mean(axis=1))),
        "busiest_expert_share": float(use.max()),
    }


def _buckets(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Bucket]:
    return group_by_length(encode(tokenizer, examples), tokenizer.pad_token_id)


def _predict(model: Qwen3_5MoeForCausalLM, batch: Bucket) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Return for each token after the first of its row if it is the most likely one, and its log-likelihood."""
    tokens = torch.from_numpy(batch.tokens).to(model.device).long()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, :-1].float()
    targets = tokens[:, 1:]
    right = logits.argmax(-1) == targets
    likelihood = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return right.cpu().numpy(), likelihood.cpu().numpy()


def _recall(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> float:
    """Return the share of documents whose masked tokens are all right."""
    rows = []
    for bucket in buckets:
        for batch in sequential_batches(bucket, _BATCH):
            right, _ = _predict(model, batch)
            rows.append((right | ~batch.loss_mask[:, 1:]).all(axis=1))
    return float(np.concatenate(rows).mean())


def _right_turns(model: Qwen3_5MoeForCausalLM, bucket: Bucket) -> Iterator[list[bool]]:
    """Yield for each document which of the assistant's turns are right."""
    for batch in sequential_batches(bucket, _BATCH):
        right, _ = _predict(model, batch)
        for row, mask in zip(right, batch.loss_mask[:, 1:], strict=True):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
            yield [bool(row[start:end].all()) for start, end in edges.reshape(-1, 2)]


def _right_share(documents: Sequence[Sequence[bool]], turn: int) -> float:
    return float(np.mean([turns[turn] for turns in documents]))


def _perplexity(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> float:
    total, count = 0.0, 0
    for bucket in buckets:
        for batch in sequential_batches(bucket, _BATCH):
            _, likelihood = _predict(model, batch)
            mask = batch.loss_mask[:, 1:]
            total, count = total + float(likelihood[mask].sum()), count + int(mask.sum())
    return math.exp(-total / count)


def _expert_use(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> NDArray[np.float64]:
    """Return the share of a layer's choices that each expert gets, ``[layers, experts]``."""
    use = np.zeros((model.config.num_hidden_layers, model.config.num_experts))
    for bucket in buckets:
        for batch in sequential_batches(bucket, _BATCH):
            tokens = torch.from_numpy(batch.tokens).to(model.device).long()
            is_text = (tokens != model.config.pad_token_id).reshape(-1)
            with torch.no_grad():
                router_logits = model.model(tokens, use_cache=False, output_router_logits=True).router_logits
            for layer, logits in enumerate(router_logits):
                chosen = logits[is_text].topk(model.config.num_experts_per_tok).indices
                use[layer] += chosen.reshape(-1).bincount(minlength=use.shape[1]).cpu().numpy()
    shares: NDArray[np.float64] = use / use.sum(axis=1, keepdims=True)
    return shares


@contextmanager
def _top_k(model: Qwen3_5MoeForCausalLM, count: int) -> Iterator[None]:
    """Route each token to ``count`` experts for a while."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    before = gates[0].top_k
    for gate in gates:
        gate.top_k = count
    try:
        yield
    finally:
        for gate in gates:
            gate.top_k = before
