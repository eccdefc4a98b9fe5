"""Train the demo model's tokenizer: byte-level BPE on a sample of the training data.

    python -m demo.training.tokenizer --wordnet usr/share/wordnet

writes ``tokenizer.json`` and ``tokenizer_config.json`` to ``demo/model``; the chat template and the configuration there
are handwritten. Pre-tokenization separates capitalized words, digits and line breaks from a preceding space or line
break, so that a name, a number or an empty thought has the same tokens in every context: to copy it, the model copies
tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from demo import MODEL
from demo.training.dataset import SEED, Dataset, Example

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_PRE_TOKENS = r"\n| ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}|\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+"
_DIALOGUES = 20_000


def render(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """Return an example as the text that the model reads."""
    if example.text:
        return example.text + END_OF_TEXT
    # Without tokenization the result is a string.
    return cast(str, tokenizer.apply_chat_template(example.messages, tools=[*example.tools] or None, tokenize=False))


def train_tokenizer(dataset: Dataset, vocab_size: int, chat_template: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer on all dictionary entries and a sample of the dialogues."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        chat_template=chat_template,
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_CONTROL_TOKENS) - len(_TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(dataset, tokenizer), trainer)
    backend.add_special_tokens(list(_CONTROL_TOKENS))
    backend.add_tokens(list(_TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[TURN_START],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=chat_template,
    )


def _texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for number in range(len(dataset.entries)):
        yield dataset.plain_entry(number).text
    for number in range(_DIALOGUES):
        text = render(tokenizer, dataset.tool_dialogue(number))
        for token in (*_CONTROL_TOKENS, *_TAGS):
            text = text.replace(token, "\n")
        yield text


def main() -> None:
    """Train the tokenizer and save it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    dataset = Dataset.load(parser.parse_args().wordnet, SEED)
    vocab_size = json.loads((MODEL / "config.json").read_text())["text_config"]["vocab_size"]
    chat_template = (MODEL / "chat_template.jinja").read_text()
    train_tokenizer(dataset, vocab_size, chat_template).save_pretrained(MODEL)


if __name__ == "__main__":
    main()
