"""How well the demo model knows its words and calls its tools.

Every score feeds the model the right text and compares what it would write next, token by token: an answer counts as
right if each of its tokens is the most likely one, which is when greedy decoding would have written it.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM

from demo.training import dataset
from demo.training.batches import Bucket, bucketed, encode, in_order
from demo.training.dataset import Example, Recipe

_BATCH = 32768
_USED = 0.1  # of an even share of the tokens makes an expert count as used


def scores(
    model: Qwen3_5MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, plan: Recipe, size: int
) -> dict[str, float]:
    """Recall of training words, perplexity of held-out words, calls of tools, and use of experts.

    Calls are those that held-out phrasings ask for, of tools written and made up, and those that training phrasings
    ask for with held-out values; answers are those to held-out phrasings.

    Args:
        model (Qwen3_5MoeForCausalLM): the model.
        tokenizer (PreTrainedTokenizerFast): its tokenizer.
        plan (Recipe): what it was trained on.
        size (int): how many training words, held-out words and dialogues of each kind to score at most.
    """
    some = plan.entries[:: len(plan.entries) // size]
    known = _buckets(tokenizer, [Example("definition", dataset.asked(entry)) for entry in some])
    lines = _buckets(tokenizer, [Example("line", text=entry.line) for entry in some])
    hidden = _buckets(tokenizer, [Example("line", text=entry.line) for entry in plan.held_out[:size]])
    written, made_up, familiar = (
        _buckets(tokenizer, [plan.call(number, *kind) for number in range(size)])
        for kind in ((True, True), (False, True), (True, False))
    )
    calls = {
        name: [turn for bucket in buckets for turn in _turns(model, bucket)]
        for name, buckets in {"written": written, "made_up": made_up, "familiar": familiar}.items()
    }
    used = _expert_use(model, known + written + made_up)
    with _top_k(model, 1):
        recall_top_1 = _recall(model, known)
    return {
        "recall": _recall(model, known),
        "recall_top_1": recall_top_1,
        "held_out_perplexity": _perplexity(model, hidden),
        "training_perplexity": _perplexity(model, lines),
        "held_out_calls_exact": _share(calls["written"] + calls["made_up"], 0),
        "held_out_calls_written": _share(calls["written"], 0),
        "held_out_calls_made_up": _share(calls["made_up"], 0),
        "training_phrasings_calls_exact": _share(calls["familiar"], 0),
        "held_out_answers_exact": _share(calls["written"] + calls["made_up"], -1),
        "experts_used": float(np.min((used > _USED / used.shape[1]).mean(axis=1))),
        "busiest_expert_share": float(used.max()),
    }


def _buckets(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[Bucket]:
    return bucketed(encode(tokenizer, examples), tokenizer.pad_token_id)


@torch.no_grad()
def _predicted(model: Qwen3_5MoeForCausalLM, batch: Bucket) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """For each token but the first of each row: whether it is the most likely one, and its log likelihood."""
    tokens = torch.from_numpy(batch.tokens).to(model.device).long()
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    targets = tokens[:, 1:]
    right = logits.argmax(-1) == targets
    likelihood = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return right.cpu().numpy(), likelihood.cpu().numpy()


def _recall(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> float:
    """The share of rows that are right wherever they count."""
    rows = []
    for bucket in buckets:
        for batch in in_order(bucket, _BATCH):
            right, _ = _predicted(model, batch)
            rows.append((right | ~batch.counts[:, 1:]).all(axis=1))
    return float(np.concatenate(rows).mean())


def _turns(model: Qwen3_5MoeForCausalLM, bucket: Bucket) -> Iterator[list[bool]]:
    """For each row whether each of the assistant's turns is right."""
    for batch in in_order(bucket, _BATCH):
        right, _ = _predicted(model, batch)
        for row, counts in zip(right, batch.counts[:, 1:], strict=True):
            edges = np.flatnonzero(np.diff(np.concatenate(([0], counts.astype(int), [0]))))
            yield [bool(row[start:end].all()) for start, end in edges.reshape(-1, 2)]


def _share(turns: Sequence[Sequence[bool]], number: int) -> float:
    return float(np.mean([turn[number] for turn in turns]))


def _perplexity(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> float:
    total, count = 0.0, 0
    for bucket in buckets:
        for batch in in_order(bucket, _BATCH):
            _, likelihood = _predicted(model, batch)
            counts = batch.counts[:, 1:]
            total, count = total + float(likelihood[counts].sum()), count + int(counts.sum())
    return math.exp(-total / count)


@torch.no_grad()
def _expert_use(model: Qwen3_5MoeForCausalLM, buckets: Sequence[Bucket]) -> NDArray[np.float64]:
    """Each layer's share of choices that fall on each expert."""
    use = np.zeros((model.config.num_hidden_layers, model.config.num_experts))
    for bucket in buckets:
        for batch in in_order(bucket, _BATCH):
            tokens = torch.from_numpy(batch.tokens).to(model.device).long()
            read = (tokens != model.config.pad_token_id).reshape(-1)
            routed = model.model(tokens, use_cache=False, output_router_logits=True).router_logits
            for layer, logits in enumerate(routed):
                chosen = logits[read].topk(model.config.num_experts_per_tok).indices
                use[layer] += chosen.reshape(-1).bincount(minlength=use.shape[1]).cpu().numpy()
    shares: NDArray[np.float64] = use / use.sum(axis=1, keepdims=True)
    return shares


@contextmanager
def _top_k(model: Qwen3_5MoeForCausalLM, count: int) -> Iterator[None]:
    gates = [layer.mlp.gate for layer in model.model.layers]
    before = gates[0].top_k
    for gate in gates:
        gate.top_k = count
    try:
        yield
    finally:
        for gate in gates:
            gate.top_k = before
