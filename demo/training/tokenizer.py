"""The demo model's tokenizer: byte-level BPE, trained on a sample of the recipe.

    python -m demo.training.tokenizer --wordnet usr/share/wordnet

writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``demo/model``, beside the chat template and the
configuration, which are written by hand. Capitalised words, digits and line breaks never share a token with the space
or the line before them, so that a name, a number or an empty thought has the same tokens wherever it stands: copying it
is copying tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo import MODEL
from demo.training import dataset
from demo.training.dataset import SEED, Example, Recipe

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CONTROL = (PAD, START, END)
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_PIECES = r"\n| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}|\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+"
_DIALOGUES = 20_000


def render(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """An example as the text that the model reads."""
    if example.text:
        return example.text + PAD
    text: str = tokenizer.apply_chat_template(example.messages, tools=example.tools or None, tokenize=False)
    return text


def train(plan: Recipe, size: int, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of that many entries for what a recipe says."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(_CONTROL) - len(_TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_sample(plan, tokenizer), trainer)
    backend.add_special_tokens(list(_CONTROL))
    backend.add_tokens(list(_TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=template,
    )


def _sample(plan: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[str]:
    for number in range(len(plan.entries)):
        yield plan.line(number).text
    for number in range(_DIALOGUES):
        text = render(tokenizer, plan.tool_dialogue(number))
        for mark in (*_CONTROL, *_TAGS):
            text = text.replace(mark, "\n")
        yield text


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    size = json.loads((MODEL / "config.json").read_text())["text_config"]["vocab_size"]
    template = (MODEL / "chat_template.jinja").read_text()
    train(dataset.read(parser.parse_args().wordnet, SEED), size, template).save_pretrained(MODEL)


if __name__ == "__main__":
    main()
