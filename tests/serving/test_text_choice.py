"""The text of a completion with tokenizers of every kind: their detokenizers drop spaces, and they add tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from mlx_lm.tokenizer_utils import load as load_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from flashmoe_mlx.constrain import vocabulary_of
from flashmoe_mlx.generation.job import Answer, Job, Token
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.generation.prompt_logprobs import PromptToken
from flashmoe_mlx.serving.openai.request import read_request
from flashmoe_mlx.serving.openai.schema import CompletionRequest
from flashmoe_mlx.serving.openai.text_choice import TextChoice
from flashmoe_mlx.serving.openai.token_bytes import TokenBytes
from tests.support.serving import DEFAULTS

KINDS = {
    "bpe": BPEStreamingDetokenizer,
    "sentencepiece": SPMStreamingDetokenizer,
    "other": NaiveStreamingDetokenizer,
}
WORDS = ["Paris", "is", "big"]


def make_tokenizer(kind: str, folder: Path) -> TokenizerWrapper:
    """Return a tokenizer that begins each text with ``<s>``."""
    space = "\u0120" if kind == "bpe" else "\u2581"
    vocabulary = ["<unk>", "<s>", "</s>"]
    if kind == "bpe":
        vocabulary += sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        vocabulary += [f"<0x{byte:02X}>" for byte in range(256)] + [space, *"Parisbg"]
    vocabulary += [f"{space}{word}" for word in WORDS] + [space * 2]
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=kind != "bpe"))
    if kind == "bpe":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        # mlx-lm does not know this order of steps.
        tokenizer.decoder = decoders.Sequence(steps if kind == "sentencepiece" else [*steps, decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(folder)
    assert isinstance(loaded.detokenizer, KINDS[kind])
    return loaded


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> TokenizerWrapper:
    return make_tokenizer(request.param, tmp_path)


def written(tokenizer: TokenizerWrapper, tokens: list[int], prompt: Any = "a", **fields: Any) -> dict[str, Any]:
    """Return the choice that is made of tokens, whose texts come from mlx-lm's detokenizer."""
    body = json.dumps({"prompt": prompt, "logprobs": 1} | fields).encode()
    request = read_request(CompletionRequest, body, DEFAULTS)
    answer = Answer(Job(Prompt.from_text(prompt, tokenizer), 9))
    answer.prompt_logprobs = [PromptToken(token, -1.0, ()) for token in answer.job.prompt.tokens]
    choice = TextChoice(0, request, answer, TokenBytes(vocabulary_of(tokenizer)), tokenizer.eos_token_ids)
    detokenizer = tokenizer.detokenizer
    for number, token in enumerate(tokens):
        last = number == len(tokens) - 1
        if token not in tokenizer.eos_token_ids:
            detokenizer.add_token(token)
        if last:
            detokenizer.finalize()
        choice.add(Token(detokenizer.last_segment, token, -1.0, (), "length" if last else None))
    choice.end()
    return choice.whole()


def ids_of(tokenizer: TokenizerWrapper, *texts: str) -> list[int]:
    space = "\u0120" if "\u0120Paris" in tokenizer.get_vocab() else "\u2581"
    return [tokenizer.get_vocab()[text.replace(" ", space)] for text in texts]


@pytest.mark.parametrize(
    "texts",
    [[" Paris", " is"], ["P", "a", " is"], [" Paris"], [" ", "P"], ["  ", "P"], [" "], ["  "], [" ", " Paris", "</s>"]],
)
def test_a_completion_keeps_its_spaces(tokenizer: TokenizerWrapper, texts: list[str]) -> None:
    choice = written(tokenizer, ids_of(tokenizer, *texts))
    assert choice["text"] == "".join(texts).removesuffix("</s>")
    assert choice["logprobs"]["tokens"] == texts
    assert choice["logprobs"]["text_offset"] == [len("".join(texts[:number])) for number in range(len(texts))]


@pytest.mark.parametrize("text", ["Paris", "<s>Paris", "<s>", " Paris is", "<s> big"])
def test_a_text_has_one_first_token(tokenizer: TokenizerWrapper, text: str) -> None:
    tokens = Prompt.from_text(text, tokenizer).tokens
    assert tokens[0] == tokenizer.bos_token_id and tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("text", ["Paris", "<s>Paris", " big", "\u00e9"])
def test_an_echo_is_the_text_that_was_sent(tokenizer: TokenizerWrapper, text: str) -> None:
    tokens = Prompt.from_text(text, tokenizer).tokens
    choice = written(tokenizer, ids_of(tokenizer, " is"), text, echo=True)
    assert choice["text"] == f"{text} is"
    offsets = choice["logprobs"]["text_offset"]
    assert len(offsets) == len(tokens) + 1 and offsets[0] == 0 and offsets == sorted(offsets)
    assert offsets[-1] == len(text)
