"""Schema of OpenAI's requests, as msgspec structures. A field that is not here is refused."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

from flashmoe_mlx.serving.errors import ApiError
from flashmoe_mlx.serving.openai.messages import AssistantMessage, Message, Strict, conversation_of

MAX_MESSAGES = 1024
MAX_TOOLS = 128
MAX_PROMPTS = 128

_Positive = Annotated[int, Meta(ge=1)]
_Natural = Annotated[int, Meta(ge=0)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Word = Annotated[str, Meta(min_length=1, max_length=1024)]
_Name = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Function(Strict):
    """A function that the model may call, with the JSON schema of its parameters."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The name of a function."""

    name: str


class NamedTool(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Strict, tag_field="type", tag="text"):
    """Free text."""


class JsonFormat(Strict, tag_field="type", tag="json_object"):
    """Any JSON object."""


class NamedSchema(Strict):
    """A JSON schema, enforced as far as a grammar can; with ``strict``, one that cannot be enforced is refused."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(Strict, tag_field="type", tag="json_schema"):
    """JSON that matches a schema."""

    json_schema: NamedSchema


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class TemplateOptions(Strict):
    """Variables of the chat template."""

    enable_thinking: bool | None = None


class Sampling(Struct, forbid_unknown_fields=True, kw_only=True):
    """Fields of both kinds of request. Those that only concern OpenAI's service, such as ``user``, have no effect."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    # -1 or None: as many as fit.
    max_tokens: Annotated[int, Meta(ge=-1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)]
    top_p: Annotated[float, Meta(gt=0, le=1)]
    top_k: _Natural
    min_p: _Share
    xtc_probability: _Share = 0.0
    xtc_threshold: Annotated[float, Meta(ge=0, le=0.5)] = 0.1
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    repetition_context_size: _Positive = 20
    presence_penalty: _Penalty = 0.0
    presence_context_size: _Positive = 20
    frequency_penalty: _Penalty = 0.0
    frequency_context_size: _Positive = 20
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: _Word | Annotated[list[_Word], Meta(max_length=16)] = []
    n: Literal[1] = 1
    user: str = ""

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer, as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class ChatRequest(Sampling, kw_only=True):
    """The body of ``/v1/chat/completions``."""

    prompt_field: ClassVar[str] = "messages"

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Meta(ge=-1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    # Kept as sent, because templates print them; read_request() validates them.
    tools: Annotated[list[dict[str, Any]], Meta(max_length=MAX_TOOLS)] = []
    tool_choice: Literal["auto", "none", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    response_format: TextFormat | JsonFormat | SchemaFormat = msgspec.field(default_factory=TextFormat)
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    continue_final_message: bool = False
    # vLLM's clients send false with the field above.
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateOptions = msgspec.field(default_factory=TemplateOptions)
    metadata: dict[str, str] = {}
    prompt_cache_key: str = ""
    safety_identifier: str = ""
    service_tier: Literal["auto", "default"] = "auto"
    store: Literal[False] = False

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """Tools that the model may call."""
        return self.tools if self.tool_choice != "none" else []

    @property
    def continues(self) -> bool:
        """The answer continues the last message."""
        last = self.messages[-1]
        return self.continue_final_message or (isinstance(last, AssistantMessage) and (last.prefix or last.prefill))

    def conversation(self) -> list[dict[str, Any]]:
        """Return the messages as chat templates take them, with the results of calls in the order of the calls.

        Raises:
            ApiError: The arguments of a call are not a JSON object, or a result belongs to no call.
        """
        return conversation_of(self.messages)


class CompletionRequest(Sampling, kw_only=True):
    """The body of ``/v1/completions``: one or more prompts, each as text or tokens."""

    prompt_field: ClassVar[str] = "prompt"

    prompt: str | Annotated[list[str | _Natural | list[_Natural]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Literal[1] = 1
    echo: bool = False
    suffix: Literal[""] = ""

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts: a list of numbers is one prompt, any other list is one prompt an item.

        Raises:
            ApiError: Numbers are mixed with prompts, or there are too many prompts.
        """
        if isinstance(self.prompt, str):
            return [self.prompt]
        numbers = [each for each in self.prompt if isinstance(each, int)]
        if len(numbers) == len(self.prompt):
            return [numbers]
        if numbers:
            raise ApiError(400, "prompt mixes tokens with whole prompts: send a list of either.", "prompt")
        if len(self.prompt) > MAX_PROMPTS:
            raise ApiError(400, f"prompt has {len(self.prompt)} prompts; the limit is {MAX_PROMPTS}.", "prompt")
        return [each for each in self.prompt if not isinstance(each, int)]


Request = ChatRequest | CompletionRequest
