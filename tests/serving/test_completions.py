"""Completions: prompts of every form, spaces, logprobs, echo, and what evaluation harnesses ask for."""

from itertools import pairwise
from typing import Any

import mlx.core as mx
import openai
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from demo import MODEL
from flashmoe_mlx import load
from tests.support.serving import Running

PATH = "/v1/completions"
TEXTS = ["heron (noun):", "A sofa is", "The word \u00e9t\u00e9 \U0001f600 means"]


def complete(running: Running, **fields: Any) -> dict[str, Any]:
    status, _, answer = running.ask("POST", PATH, {"max_tokens": 4} | fields)
    assert status == 200, answer
    return answer


def choice(running: Running, **fields: Any) -> dict[str, Any]:
    return complete(running, **fields)["choices"][0]


@pytest.fixture(scope="module")
def tokenizer(running: Running) -> TokenizerWrapper:
    return running.worker.tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_the_first_space_is_kept(running: Running, tokenizer: TokenizerWrapper, text: str) -> None:
    token = tokenizer.encode(" heron")[0]
    for stream in (False, True):
        fields = {"prompt": text, "logit_bias": {str(token): 100}, "max_tokens": 3, "logprobs": 0}
        if stream:
            client = running.client()
            chunks = client.completions.create(model="any", stream=True, **fields)
            said = "".join(chunk.choices[0].text for chunk in chunks)
        else:
            whole = choice(running, **fields)
            said, tokens = whole["text"], whole["logprobs"]["tokens"]
            assert said == "".join(tokens)
            assert whole["logprobs"]["text_offset"] == [len("".join(tokens[:n])) for n in range(3)]
        assert said.startswith(" her")


@pytest.mark.parametrize("spaces", [" ", "  ", "\n"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_spaces_alone_are_kept(running: Running, tokenizer: TokenizerWrapper, spaces: str, count: int) -> None:
    token = tokenizer.encode(spaces)[0]
    said = choice(running, prompt="x", logit_bias={str(token): 100}, max_tokens=count)["text"]
    assert said == tokenizer.decode([token]) * count


@pytest.mark.parametrize("text", TEXTS)
def test_logprobs_of_zero_are_those_of_the_tokens_alone(running: Running, text: str) -> None:
    logprobs = choice(running, prompt=text, logprobs=0)["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == 4
    assert logprobs["top_logprobs"] is None and all(each <= 0 for each in logprobs["token_logprobs"])
    assert choice(running, prompt=text)["logprobs"] is None
    with_tops = choice(running, prompt=text, logprobs=2)["logprobs"]
    assert with_tops["token_logprobs"] == logprobs["token_logprobs"]
    assert [max(top.values()) for top in with_tops["top_logprobs"]] == logprobs["token_logprobs"]


def test_tops_with_parts_of_characters_stay_apart(running: Running, tokenizer: TokenizerWrapper) -> None:
    parts = tokenizer.encode("\U0001f600")
    biases = {str(token): 90 + number for number, token in enumerate(parts)}
    logprobs = choice(running, prompt="x", logprobs=4, max_tokens=1, logit_bias=biases)["logprobs"]
    assert set(logprobs["top_logprobs"][0]) == {rf"bytes:\x{byte:02x}" for byte in "\U0001f600".encode()}


def test_prompts_are_answered_one_after_the_other(running: Running, tokenizer: TokenizerWrapper) -> None:
    single = [complete(running, prompt=text) for text in TEXTS]
    tokens = [tokenizer.encode(text) for text in TEXTS]
    for prompts in (TEXTS, tokens, [TEXTS[0], tokens[1], TEXTS[2]]):
        answer = complete(running, prompt=prompts)
        assert [each["index"] for each in answer["choices"]] == [0, 1, 2]
        assert [each["text"] for each in answer["choices"]] == [each["choices"][0]["text"] for each in single]
        for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert answer["usage"][count] == sum(each["usage"][count] for each in single)
    assert choice(running, prompt=tokens[0]) == choice(running, prompt=[TEXTS[0]]) == single[0]["choices"][0]


def test_a_stream_has_the_choices_of_all_prompts(client: openai.OpenAI, running: Running) -> None:
    chunks = client.completions.create(
        model="any", prompt=TEXTS, max_tokens=4, stream=True, stream_options={"include_usage": True}, best_of=1
    )
    *parts, usage = chunks
    texts, reasons = ["", "", ""], [None, None, None]
    for part in parts:
        texts[part.choices[0].index] += part.choices[0].text
        reasons[part.choices[0].index] = part.choices[0].finish_reason
    whole = complete(running, prompt=TEXTS)
    assert texts == [each["text"] for each in whole["choices"]] and reasons == ["length"] * 3
    assert usage.usage.total_tokens == whole["usage"]["total_tokens"]


def test_a_stop_in_one_choice_does_not_end_the_others(running: Running) -> None:
    texts = [each["text"] for each in complete(running, prompt=TEXTS, max_tokens=8)["choices"]]
    stop = texts[0][3:6]
    answer = complete(running, prompt=TEXTS, max_tokens=8, stop=stop)
    assert [each["text"] for each in answer["choices"]] == [text.partition(stop)[0] for text in texts]


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "prompt"),
        ([[]], "The prompt is empty."),
        (["a", ""], "The prompt is empty."),
        ([1, "a"], "prompt mixes tokens"),
        ([[1], 2], "prompt mixes tokens"),
        ([[99999]], "99999 is not a token"),
        ([[-1]], "prompt[0][0]"),
        (["a"] * 129, "prompt has 129 prompts"),
    ],
)
def test_lists_that_are_no_prompts_are_refused(running: Running, prompt: Any, reason: str) -> None:
    status, _, answer = running.ask("POST", PATH, {"prompt": prompt})
    assert status == 400 and answer["error"]["message"].startswith(reason)
    assert answer["error"]["param"].startswith("prompt")


def test_prompts_of_one_request_may_be_more_than_the_queue_holds(running: Running) -> None:
    answer = complete(running, prompt=["heron", "sofa"] * 20, max_tokens=1)
    assert len(answer["choices"]) == 40


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_an_echo_is_the_prompt_with_its_logprobs(
    running: Running, tokenizer: TokenizerWrapper, text: str, max_tokens: int
) -> None:
    ids = tokenizer.encode(text)
    answer = complete(running, prompt=text, echo=True, logprobs=1, max_tokens=max_tokens)
    echoed, logprobs = answer["choices"][0], answer["choices"][0]["logprobs"]
    plain = choice(running, prompt=text, max_tokens=max_tokens)
    assert echoed["text"] == text + plain["text"] and echoed["finish_reason"] == "length"
    assert len(logprobs["tokens"]) == len(ids) + max_tokens == len(logprobs["text_offset"])
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"][0] == 0 and all(a <= b for a, b in pairwise(logprobs["text_offset"]))
    assert logprobs["text_offset"][len(ids) :][:1] in ([], [len(text)])
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice(running, prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens) == echoed


def test_the_logprobs_of_a_prompt_are_those_of_the_model(running: Running, tokenizer: TokenizerWrapper) -> None:
    ids = tokenizer.encode("heron (noun): grey or white wading bird with long neck and long legs.")
    logprobs = choice(running, prompt=ids, echo=True, logprobs=1, max_tokens=0)["logprobs"]
    model, _ = load(str(MODEL), ram_budget="1GB")
    logits = model(mx.array(ids)[None])[0].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for place, (token, logprob, top) in enumerate(
        zip(ids[1:], logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True)
    ):
        assert logprob == pytest.approx(expected[place, token].item(), abs=1e-2)
        assert max(top.values()) == pytest.approx(expected[place].max().item(), abs=1e-2)


def test_an_echo_without_logprobs_has_the_text(running: Running) -> None:
    for prompt in TEXTS:
        echoed = choice(running, prompt=prompt, echo=True)
        assert echoed["text"].startswith(prompt) and echoed["logprobs"] is None


def test_a_stop_text_in_the_prompt_is_not_a_stop(running: Running) -> None:
    assert choice(running, prompt=TEXTS[0], echo=True, stop="noun")["text"].startswith(TEXTS[0])


def loglikelihood(running: Running, context: list[int], continuation: list[int], **fields: Any) -> tuple[float, bool]:
    """Ask and read as lm-eval's local-completions does."""
    body = {"model": "demo", "prompt": [context + continuation], "temperature": 0, "max_tokens": 1, "logprobs": 1}
    answer = complete(running, **body, seed=1234, echo=True, **fields)["choices"][0]["logprobs"]
    own = answer["token_logprobs"][len(context) : -1]
    tops = answer["top_logprobs"][len(context) : -1]
    assert len(own) == len(continuation)
    return sum(own), all(logprob == max(top.values()) for logprob, top in zip(own, tops, strict=True))


def test_loglikelihoods_tell_the_models_own_words_from_others(running: Running, tokenizer: TokenizerWrapper) -> None:
    context = tokenizer.encode("heron (noun):")
    own = tokenizer.encode(choice(running, prompt=context, max_tokens=6)["text"])
    likely, greedy = loglikelihood(running, context, own)
    unlikely, not_greedy = loglikelihood(running, context, tokenizer.encode(" seven sofas sang"))
    assert greedy and not not_greedy and unlikely < likely < 0


def test_a_generated_end_has_a_logprob_of_its_own(running: Running, tokenizer: TokenizerWrapper) -> None:
    """Harnesses drop the last logprob as that of the one generated token: it must be there, even if it is the end."""
    context, continuation = tokenizer.encode("heron (noun):"), tokenizer.encode(" grey bird")
    expected = loglikelihood(running, context, continuation)
    ends = {str(token): 100 for token in tokenizer.eos_token_ids}
    assert loglikelihood(running, context, continuation, logit_bias=ends) == expected


def test_rolling_loglikelihoods_begin_with_one_token(running: Running, tokenizer: TokenizerWrapper) -> None:
    prefix = [min(tokenizer.eos_token_ids)]
    for text in TEXTS:
        total, _ = loglikelihood(running, prefix, tokenizer.encode(text))
        assert total < 0


@pytest.mark.parametrize("max_tokens", [-1, None])
def test_an_answer_without_a_limit_goes_on_to_its_end(running: Running, max_tokens: int | None) -> None:
    defaults = running.server.service.defaults
    running.server.service.defaults = defaults | {"max_tokens": None}
    try:
        answer = choice(running, prompt="heron (noun):", max_tokens=max_tokens, stop=".")
    finally:
        running.server.service.defaults = defaults
    assert answer["finish_reason"] == "stop" and len(answer["text"]) > 40
