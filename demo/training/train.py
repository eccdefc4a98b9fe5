"""Train the demo model on one GPU.

    python -m demo.training.train --wordnet usr/share/wordnet --out build/trained --minutes 20.3

WordNet comes from Debian (`apt-get download wordnet-base && dpkg -x wordnet-base*.deb .`). The tokenizer, the chat
template and the configuration are those in ``demo/model``. ``--minutes`` bounds the whole run: the learning rate falls
to zero in time for the scores and the last save. Out come bfloat16 weights in Hugging Face's layout, ``loss.csv`` with
the loss curve, and ``training.json`` with what the run was and how well its model does; the last line printed is the
same JSON. ``python -m demo.training.export`` makes the 8-bit model of it. ``--tiny`` trains a toy for a check without
a GPU.

The weights are held twice: in float32 for the optimiser, and in bfloat16, as they are saved, for every pass (on
a CPU in float32, where bfloat16 is slow).
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from demo import MODEL
from demo.training import dataset, layers
from demo.training.batches import Bucket, bucketed, encode, forever
from demo.training.dataset import SEED, Recipe
from demo.training.scores import scores

_sources: tuple[Recipe, PreTrainedTokenizerFast]  # of a process that writes documents

Document = tuple[NDArray[np.int32], NDArray[np.bool_]]

ROUNDS = 16  # questions about every word
LINES = 4  # plain entries of every word
CHATS = 60_000
WITHOUT_TOOLS = 8_000
TOOL_DIALOGUES = 400_000
SHARES = {"words": 1, "tools": 7}  # tokens in a step
PEAK, WARM_UP, DECAY, CLIP = 2e-3, 0.02, 0.1, 1.0
RESERVE = 45.0  # seconds for scores and the last save
SHARD = 15_000_000  # bytes
_JOB = 1000  # documents that a process writes in one go
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
}


def documents(plan: Recipe, tokenizer: PreTrainedTokenizerFast, scale: float) -> tuple[list[Document], list[Document]]:
    """What is read about words and about tools, written by one process for each core."""
    words = len(plan.entries)
    counts = {
        "line": LINES * words,
        "definition": ROUNDS * words,
        "chat": CHATS,
        "without_tools": WITHOUT_TOOLS,
        "tool_dialogue": TOOL_DIALOGUES,
    }
    jobs = []
    for kind, count in counts.items():
        count = int(count * scale)
        jobs += [(kind, start, min(start + _JOB, count)) for start in range(0, count, _JOB)]
    about_words: list[Document] = []
    about_tools: list[Document] = []
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _begin, (plan, tokenizer)) as pool:
        for (kind, _, _), (tokens, counted, lengths) in zip(jobs, pool.imap(_write, jobs), strict=True):
            ends = np.cumsum(lengths)[:-1]
            pairs = zip(np.split(tokens, ends), np.split(counted, ends), strict=True)
            (about_tools if kind == "tool_dialogue" else about_words).extend(pairs)
    return about_words, about_tools


def _begin(plan: Recipe, tokenizer: PreTrainedTokenizerFast) -> None:
    global _sources
    _sources = plan, tokenizer


def _write(job: tuple[str, int, int]) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]]:
    """Many documents as one, which is quicker to hand over, with their lengths."""
    kind, start, end = job
    plan, tokenizer = _sources
    found = encode(tokenizer, [getattr(plan, kind)(number) for number in range(start, end)])
    tokens, counted = zip(*found, strict=True)
    return np.concatenate(tokens), np.concatenate(counted), [len(one) for one in tokens]


class Weights:
    """A model's weights in float32, with the optimiser that moves them."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._exact = [p.detach().clone() for p in model.parameters()]
        self._used = list(model.parameters())
        for used in self._used:  # but no buffer: rotary frequencies stay exact
            used.data = used.data.to(dtype)
        for exact in self._exact:
            exact.grad = torch.zeros_like(exact)
        groups = [
            {"params": [p for p in self._exact if p.ndim > 1], "weight_decay": DECAY},
            {"params": [p for p in self._exact if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimiser = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)

    def step(self, rate: float) -> None:
        """Move by the model's gradients, and hand it the result."""
        gradients = [exact.grad for exact in self._exact]
        torch._foreach_copy_(gradients, [p.grad for p in self._used])
        nn.utils.clip_grad_norm_(self._exact, CLIP)
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()
        with torch.no_grad():
            torch._foreach_copy_(self._used, self._exact)
        for used in self._used:
            used.grad = None


def losses(model: Qwen3_5MoeForCausalLM, batch: Bucket) -> tuple[Tensor, Tensor]:
    """The mean loss of the tokens that count, and how unevenly the experts are used: 1 at best, for each layer."""
    tokens = torch.from_numpy(batch.tokens).to(model.device, non_blocking=True).long()
    positions = torch.from_numpy(np.flatnonzero(batch.counts[:, 1:])).to(model.device, non_blocking=True)
    out = model.model(tokens, use_cache=False, output_router_logits=True)
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)[positions]
    loss = nn.functional.cross_entropy(model.lm_head(hidden).float(), tokens[:, 1:].flatten()[positions])
    read = (tokens != model.config.pad_token_id).flatten().float()
    read = read / read.sum()
    unevenness = torch.stack(
        [_unevenness(logits, read, model.config.num_experts_per_tok) for logits in out.router_logits]
    )
    return loss, unevenness.sum()


def _unevenness(logits: Tensor, weights: Tensor, count: int) -> Tensor:
    """Experts' shares of choices times their mean probabilities, weighted by token, relative to an even use."""
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(count, dim=-1).indices
    share = torch.zeros_like(probabilities[0])
    share = share.scatter_add(0, chosen.flatten(), weights.repeat_interleave(count) / count)
    return logits.shape[-1] * (share * (weights @ probabilities)).sum()


def rate(progress: float) -> float:
    """The learning rate at a point of the run between 0 and 1: a short rise, then half a cosine down to zero."""
    return PEAK * min(progress / WARM_UP, (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def save(model: Qwen3_5MoeForCausalLM, folder: Path) -> None:
    """Write the weights as they are, without the output layer that is the embedding."""
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    shards = split_torch_state_dict_into_shards(
        tensors, max_shard_size=SHARD, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def train(
    model: Qwen3_5MoeForCausalLM, kinds: dict[str, Iterator[Bucket]], deadline: float, out: Path
) -> dict[str, Any]:
    """Steps until the deadline, each with one batch of every kind; saves four times on the way."""
    weights = Weights(model, torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    begun, tokens, step, saved = time.monotonic(), 0, 0, 0
    sums = dict.fromkeys((*kinds, "unevenness"), 0.0)
    logged = step, begun, tokens
    with (out / "loss.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", "tokens", *sums])
        while (now := time.monotonic()) < deadline:
            progress = (now - begun) / (deadline - begun)
            parts: dict[str, Tensor] = {}
            for kind, batches in kinds.items():
                batch = next(batches)
                parts[kind], unevenness = losses(model, batch)
                (parts[kind] + model.config.router_aux_loss_coef * unevenness).backward()
                parts["unevenness"] = unevenness / model.config.num_hidden_layers
                tokens += batch.tokens.size
            weights.step(rate(progress))
            step += 1
            for name, part in parts.items():
                sums[name] = sums[name] + part.detach()
            if step % 20 == 0:
                means = {name: float(total) / (step - logged[0]) for name, total in sums.items()}
                sums = dict.fromkeys(sums, 0.0)
                seconds = time.monotonic() - logged[1]
                log.writerow([step, f"{time.monotonic() - begun:.1f}", tokens, *(f"{m:.4f}" for m in means.values())])
                file.flush()
                speed = (tokens - logged[2]) / seconds
                values = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                print(f"step {step} at {time.monotonic() - begun:.0f} s: {values}, {speed:.0f} tokens/s", flush=True)
                logged = step, time.monotonic(), tokens
            if int(4 * progress) > saved:
                saved = int(4 * progress)
                save(model, out)
    save(model, out)
    return {"steps": step, "tokens": tokens, "seconds": round(time.monotonic() - begun, 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, train, score and save."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=15.0, help="how long the whole run may take (default 15)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens about words in a step (default 8192)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the examples to write (default 1)")
    parser.add_argument("--tiny", action="store_true", help="a toy instead of the model, to check the code")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    plan = dataset.read(options.wordnet, SEED)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    about_words, about_tools = documents(plan, tokenizer, options.scale)
    pad = tokenizer.pad_token_id
    kinds = {
        kind: forever(bucketed(found, pad), SHARES[kind] * options.tokens, SEED)
        for kind, found in {"words": about_words, "tools": about_tools}.items()
    }
    print(f"{len(about_words) + len(about_tools)} documents after {time.monotonic() - started:.0f} s", flush=True)

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    settings = json.loads((MODEL / "config.json").read_text())["text_config"] | (TINY if options.tiny else {})
    config = Qwen3_5MoeTextConfig(**settings)
    layers.replace_in_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = Qwen3_5MoeForCausalLM(config).float()
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)

    facts = train(model, kinds, started + 60 * options.minutes - RESERVE, options.out)
    facts["device"] = torch.cuda.get_device_name() if device == "cuda" else device
    facts["words"], facts["held_out_words"] = len(plan.entries), len(plan.held_out)
    facts |= scores(model.eval(), tokenizer, plan, 20 if options.tiny else 2000)
    facts["total_seconds"] = round(time.monotonic() - started, 1)
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
