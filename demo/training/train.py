"""Train the demo model on one GPU.

    python -m demo.training.train --wordnet usr/share/wordnet --out build/trained --minutes 20.3 --scale 0.8

WordNet comes from Debian (`apt-get download wordnet-base && dpkg -x wordnet-base*.deb .`). The tokenizer, the chat
template and the configuration are those in ``demo/model``. ``--minutes`` bounds the whole run: the learning rate decays
to zero in time for the scores and the last save. The run writes bfloat16 weights in Hugging Face's layout, ``loss.csv``
with the loss curve, and ``training.json`` with its length, device and scores, which the last line of the output
repeats. ``python -m demo.training.export`` quantizes the weights. ``--tiny`` trains a toy model, to check the code
without a GPU.

The optimizer has float32 master weights; forward and backward passes use a bfloat16 copy, which is what is saved. On a
CPU, where bfloat16 is slow, the copy is float32.
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
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from demo import MODEL
from demo.training import layers
from demo.training.batches import Bucket, Document, encode, group_by_length, random_batches
from demo.training.dataset import SEED, Dataset
from demo.training.scores import scores

# The documents to generate: each word this many times, and these many dialogues.
DEFINITIONS_PER_WORD, PLAIN_ENTRIES_PER_WORD = 16, 4
CHATS, DIALOGUES_WITHOUT_TOOLS, TOOL_DIALOGUES = 60_000, 8_000, 400_000
# The batches of a training step, as multiples of --tokens.
BATCHES = {"words": 1, "tools": 7}
PEAK_LEARNING_RATE, WARM_UP, WEIGHT_DECAY, MAX_GRADIENT_NORM = 2e-3, 0.02, 0.1, 1.0
# Seconds kept for the scores and the last save.
RESERVE = 45.0
SHARD_NBYTES = 15_000_000
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
# Documents that a process generates at once.
_JOB = 1000

# Set in each process that generates documents.
_sources: tuple[Dataset, PreTrainedTokenizerBase]


def documents(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, scale: float
) -> tuple[list[Document], list[Document]]:
    """Generate the training documents about words and those about tools, on all cores.

    Args:
        dataset (Dataset): The source of the documents.
        tokenizer (PreTrainedTokenizerBase): Encodes them.
        scale (float): The share of the documents to generate, 1 for all.
    """
    words = len(dataset.entries)
    counts = {
        "plain_entry": PLAIN_ENTRIES_PER_WORD * words,
        "definition": DEFINITIONS_PER_WORD * words,
        "chat": CHATS,
        "without_tools": DIALOGUES_WITHOUT_TOOLS,
        "tool_dialogue": TOOL_DIALOGUES,
    }
    jobs = []
    for kind, count in counts.items():
        count = int(count * scale)
        jobs += [(kind, start, min(start + _JOB, count)) for start in range(0, count, _JOB)]
    about_words: list[Document] = []
    about_tools: list[Document] = []
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), _set_sources, (dataset, tokenizer)) as pool:
        for (kind, _, _), (tokens, mask, lengths) in zip(jobs, pool.imap(_generate, jobs), strict=True):
            ends = np.cumsum(lengths)[:-1]
            generated = zip(np.split(tokens, ends), np.split(mask, ends), strict=True)
            (about_tools if kind == "tool_dialogue" else about_words).extend(generated)
    return about_words, about_tools


def _set_sources(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    global _sources
    _sources = dataset, tokenizer


def _generate(job: tuple[str, int, int]) -> tuple[NDArray[np.int32], NDArray[np.bool_], list[int]]:
    """Return documents joined into one, which is faster to pass between processes, with their lengths."""
    kind, start, end = job
    dataset, tokenizer = _sources
    encoded = encode(tokenizer, [getattr(dataset, kind)(number) for number in range(start, end)])
    tokens, masks = zip(*encoded, strict=True)
    return np.concatenate(tokens), np.concatenate(masks), [len(ids) for ids in tokens]


class MasterWeights:
    """Float32 copies of a model's weights, and the optimizer that updates them.

    Args:
        model (nn.Module): The model, whose weights become ``dtype``.
        dtype (torch.dtype): The dtype of forward and backward passes.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._master = [p.detach().clone() for p in model.parameters()]
        self._model = list(model.parameters())
        # Buffers stay as they are: rotary frequencies need float32.
        for weight in self._model:
            weight.data = weight.data.to(dtype)
        for weight in self._master:
            weight.grad = torch.zeros_like(weight)
        groups = [
            {"params": [p for p in self._master if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self._master if p.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), fused=True)

    def step(self, learning_rate: float) -> None:
        """Update the weights by the model's gradients, copy them to the model, and clear the gradients."""
        torch._foreach_copy_([weight.grad for weight in self._master], [weight.grad for weight in self._model])
        nn.utils.clip_grad_norm_(self._master, MAX_GRADIENT_NORM)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self._model, self._master)
        for weight in self._model:
            weight.grad = None


def losses(model: Qwen3_5MoeForCausalLM, batch: Bucket) -> tuple[Tensor, Tensor]:
    """Return the cross entropy of the masked tokens, and the load-balancing losses of all layers added up."""
    tokens = torch.from_numpy(batch.tokens).to(model.device, non_blocking=True).long()
    positions = torch.from_numpy(np.flatnonzero(batch.loss_mask[:, 1:])).to(model.device, non_blocking=True)
    out = model.model(tokens, use_cache=False, output_router_logits=True)
    hidden = out.last_hidden_state[:, :-1].flatten(0, 1)[positions]
    loss = nn.functional.cross_entropy(model.lm_head(hidden).float(), tokens[:, 1:].flatten()[positions])
    weights = (tokens != model.config.pad_token_id).flatten().float()
    weights = weights / weights.sum()
    balance = torch.stack(
        [_load_balancing_loss(logits, weights, model.config.num_experts_per_tok) for logits in out.router_logits]
    )
    return loss, balance.sum()


def _load_balancing_loss(logits: Tensor, weights: Tensor, top_k: int) -> Tensor:
    """Return the sum over experts of share of choices times mean probability, relative to even routing, which gives 1.

    Args:
        logits (Tensor): Router logits of one layer, ``[tokens, experts]``.
        weights (Tensor): Weights of the tokens, with a sum of 1, ``[tokens]``.
        top_k (int): Experts per token.
    """
    probabilities = logits.float().softmax(-1)
    chosen = probabilities.topk(top_k, dim=-1).indices
    share = torch.zeros_like(probabilities[0])
    share = share.scatter_add(0, chosen.flatten(), weights.repeat_interleave(top_k) / top_k)
    return logits.shape[-1] * (share * (weights @ probabilities)).sum()


def learning_rate(progress: float) -> float:
    """Return the learning rate at a point of the run from 0 to 1: a linear warm-up and a cosine decay to zero."""
    return PEAK_LEARNING_RATE * min(progress / WARM_UP, (1 + math.cos(math.pi * min(progress, 1.0))) / 2)


def save(model: Qwen3_5MoeForCausalLM, folder: Path) -> None:
    """Write the weights in bfloat16, without the output layer, which is tied to the embedding."""
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items() if name != "lm_head.weight"}
    shards = split_torch_state_dict_into_shards(
        tensors, max_shard_size=SHARD_NBYTES, filename_pattern="model{suffix}.safetensors"
    )
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def train(
    model: Qwen3_5MoeForCausalLM, kinds: dict[str, Iterator[Bucket]], deadline: float, out: Path
) -> dict[str, Any]:
    """Train until the deadline; save the weights after each quarter of the time.

    Args:
        model (Qwen3_5MoeForCausalLM): The model.
        kinds (dict[str, Iterator[Bucket]]): Batches by name; each step trains on one of each.
        deadline (float): The end of training, by ``time.monotonic()``.
        out (Path): The folder for ``loss.csv`` and the weights.

    Returns:
        dict[str, Any]: The number of steps, tokens and seconds.
    """
    weights = MasterWeights(model, torch.bfloat16 if model.device.type == "cuda" else torch.float32)
    begun, tokens, step, saved = time.monotonic(), 0, 0, 0
    sums = dict.fromkeys((*kinds, "load_balance"), 0.0)
    logged = step, begun, tokens
    with (out / "loss.csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", "tokens", *sums])
        while (now := time.monotonic()) < deadline:
            progress = (now - begun) / (deadline - begun)
            parts: dict[str, Tensor] = {}
            for kind, batches in kinds.items():
                batch = next(batches)
                parts[kind], balance = losses(model, batch)
                (parts[kind] + model.config.router_aux_loss_coef * balance).backward()
                parts["load_balance"] = balance / model.config.num_hidden_layers
                tokens += batch.tokens.size
            weights.step(learning_rate(progress))
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
    """Generate the data, train, score and save."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--minutes", type=float, default=15.0, help="limit of the whole run (default: 15)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens about words in a step (default: 8192)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the documents to generate (default: 1)")
    parser.add_argument("--tiny", action="store_true", help="train a toy model, to check the code")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    dataset = Dataset.load(options.wordnet, SEED)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    about_words, about_tools = documents(dataset, tokenizer, options.scale)
    pad = tokenizer.pad_token_id
    kinds = {
        kind: random_batches(group_by_length(found, pad), BATCHES[kind] * options.tokens, SEED)
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
    facts["words"], facts["held_out_words"] = len(dataset.entries), len(dataset.held_out)
    facts |= scores(model.eval(), tokenizer, dataset, 20 if options.tiny else 2000)
    facts["total_seconds"] = round(time.monotonic() - started, 1)
    (options.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
