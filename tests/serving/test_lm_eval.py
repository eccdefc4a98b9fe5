"""lm-eval, EleutherAI's harness, measures the model through the server, where the command `lm_eval` is installed."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from demo import MODEL
from flashmoe_mlx import load
from tests.support.serving import Running

LM_EVAL = shutil.which("lm_eval")
BIRDS = [
    ("heron (noun):", " grey or white wading bird", " seven sofas sang"),
    ("sofa (noun):", " an upholstered seat for more than one person", " grey wading bird of the sea"),
    ("oak (noun):", " a deciduous tree of the genus Quercus", " a small dog"),
]
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}{{choices[0]}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["."], "max_gen_toks": 24},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluate(running: Running, folder: Path, batch_size: int) -> dict[str, Any]:
    """Run three tasks of a few lines, and return their results by name."""
    answers = [running.ask("POST", "/v1/completions", ask)[2]["choices"][0]["text"] for ask in map(asked, BIRDS)]
    lines = [
        {"question": question, "choices": choices, "answer": answer}
        for (question, *choices), answer in zip(BIRDS, answers, strict=True)
    ]
    (folder / "birds.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "birds.jsonl")}}}
    for name, task in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATION)):
        # JSON is YAML, too.
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test"} | data | task))
    model = f"base_url={running.address}/v1/completions,model=any,tokenizer={MODEL},tokenizer_backend=huggingface"
    command = [str(LM_EVAL), "run", "--model", "local-completions", "--model_args", f"{model},max_length=2048"]
    command += ["--tasks", "choice,rolling,generation", "--include_path", str(folder), "--batch_size", str(batch_size)]
    caches = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "--output_path", str(folder / "out")], check=True, env=os.environ | caches, timeout=300)
    (results,) = (folder / "out").rglob("results_*.json")
    return dict(json.loads(results.read_text())["results"])


def asked(bird: tuple[str, ...]) -> dict[str, Any]:
    return {"prompt": bird[0], "max_tokens": 24, "stop": "."}


@pytest.mark.skipif(LM_EVAL is None, reason="lm_eval is not installed: pip install 'lm-eval[api]' transformers")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_finds_what_the_model_says(running: Running, tmp_path: Path, batch_size: int) -> None:
    results = evaluate(running, tmp_path, batch_size)
    assert results["generation"]["exact_match,none"] == 1.0
    model, tokenizer = load(str(MODEL), ram_budget="1GB")

    def loglikelihood(context: list[int], text: str) -> float:
        tokens = [*context, *tokenizer.encode(text)]
        logits = model(mx.array(tokens)[None])[0].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return sum(logprobs[place - 1, tokens[place]].item() for place in range(len(context), len(tokens)))

    right = [
        max(choices, key=lambda choice: loglikelihood(tokenizer.encode(question), choice)) == choices[0]
        for question, *choices in BIRDS
    ]
    assert results["choice"]["acc,none"] == pytest.approx(sum(right) / len(right)) and any(right)
    texts = [question + choice for question, choice, _ in BIRDS]
    bits = -sum(loglikelihood([tokenizer.eos_token_id], text) for text in texts) / math.log(2)
    size = sum(len(text.encode()) for text in texts)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits / size, rel=1e-3)
