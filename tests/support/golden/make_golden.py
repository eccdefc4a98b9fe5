"""Compute qwen3_5_moe.npz: the logits that Hugging Face transformers gives for the model in weights.py.

The tests only read the result and need no torch.  To compute it again:

    python -m venv /tmp/golden
    /tmp/golden/bin/pip install torch==2.13.0 transformers==5.23.0 numpy safetensors
    /tmp/golden/bin/python tests/golden/make_golden.py
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen3_5MoeForCausalLM
from weights import CONFIG, TOKENS, write

GOLDEN = Path(__file__).with_name("qwen3_5_moe.npz")


def load_model() -> Qwen3_5MoeForCausalLM:
    """Load the model from files, so that transformers itself vouches for their names, shapes and layout."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        model, report = Qwen3_5MoeForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    if any(report.values()):
        raise SystemExit(f"the checkpoint and the model disagree: {report}")
    return model


def prefill(model: Qwen3_5MoeForCausalLM) -> np.ndarray:
    """Return the logits of every position from one forward pass, which goes through the chunked delta rule."""
    output = model(torch.tensor([TOKENS]), output_router_logits=True)
    check_routing(torch.stack(output.router_logits))
    return output.logits[0].numpy()


def decode(model: Qwen3_5MoeForCausalLM) -> np.ndarray:
    """Return the same logits token by token, which goes through the cache and the recurrent delta rule."""
    cache, logits = None, []
    for token in TOKENS:
        output = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits[0, 0].numpy())
    return np.stack(logits)


def check_routing(router_logits: torch.Tensor) -> None:
    """Refuse router logits [layer, token, expert] that leave an expert idle or let rounding choose between two."""
    top_k = CONFIG["text_config"]["num_experts_per_tok"]
    values, experts = router_logits.sort(dim=-1, descending=True)
    margin = (values[..., top_k - 1] - values[..., top_k]).min().item()
    used = min(len(layer.unique()) for layer in experts[..., :top_k])
    print(f"routing: the choice is never closer than {margin:.1e}, every layer uses at least {used} experts")
    if margin < 5e-3 or used < CONFIG["text_config"]["num_experts"]:
        raise SystemExit("choose another seed")


def main() -> None:
    """Check transformers' two code paths against each other, then save the logits of the prefill."""
    model = load_model()
    with torch.inference_mode():
        logits, stepwise = prefill(model), decode(model)
    error = (np.linalg.norm(stepwise - logits, axis=-1) / np.linalg.norm(logits, axis=-1)).max()
    print(f"decode against prefill: relative error at most {error:.1e}")
    if error > 1e-4:
        raise SystemExit("transformers disagrees with itself")
    np.savez_compressed(GOLDEN, logits=logits, torch=torch.__version__, transformers=transformers.__version__)


if __name__ == "__main__":
    main()
