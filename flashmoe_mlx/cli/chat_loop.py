"""The chat loop: turns between a person or a pipe and a conversation, with tool calls."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

from mlx_lm.generate import GenerationResponse

from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, sampler_of, streamed_load
from flashmoe_mlx.cli.terminal import end_line, note, write
from flashmoe_mlx.config import Config
from flashmoe_mlx.generation.conversation import Conversation
from flashmoe_mlx.generation.fitted_messages import Message
from flashmoe_mlx.generation.generator import Generator
from flashmoe_mlx.generation.prefix_cache import PrefixCache
from flashmoe_mlx.generation.python_tools import PythonTools
from flashmoe_mlx.system.text import stdin_lines

HELP = "Ctrl-C stops an answer. A line with q alone quits, r begins a new conversation, h shows this."

# Rounds of calls in one turn, so that a model that never stops calling is stopped.
_MAX_ROUNDS = 16


class ChatLoop:
    """Loads a model, and takes turns with it on the terminal or over a pipe.

    Args:
        args (argparse.Namespace): The command line of :mod:`flashmoe_mlx.chat`.
        config (Config): Settings of expert streaming.
        tools (PythonTools): Functions that the model may call.

    Raises:
        ValueError: The model has no chat template, or cannot call tools and there are some.
        OSError: The model cannot be read.
    """

    def __init__(self, args: argparse.Namespace, config: Config, tools: PythonTools):
        self._args, self._config, self._tools = args, config, tools
        model, tokenizer = streamed_load(args, config)(args.model)
        self._streaming = model.streaming
        self._generator = Generator(
            model, tokenizer, PrefixCache(max_entries=2), args.prefill_step_size, max_kv_size=args.max_kv_size
        )
        self._interrupts = _Interrupts()
        self._conversation = self._begin()
        self._sampler = sampler_of(args, tokenizer)
        if tools.schemas and not self._conversation.constrains_calls:
            note("calls are not constrained to their schemas: this model's format or one of the schemas is unsupported")

    def run(self) -> None:
        """Take turns until the input ends."""
        try:
            if sys.stdin.isatty():
                note(HELP)
                with self._interrupts.handled():
                    self._talk()
            else:
                for line in stdin_lines():
                    if line.strip():
                        self._turn(line.rstrip("\n"))
        finally:
            finish(self._streaming, self._config, verbose=False)

    def _begin(self) -> Conversation:
        system = self._args.system_prompt
        return Conversation(
            self._generator,
            [] if system is None else [{"role": "system", "content": system}],
            self._tools.schemas,
            {"enable_thinking": False} if self._args.thinking == "off" else None,
        )

    def _talk(self) -> None:
        while (line := self._ask("> ")) not in (None, "q"):
            if line == "h":
                note(HELP)
            elif line == "r":
                self._conversation = self._begin()
                note("new conversation")
            elif line:
                # The error may be of this turn only; the next one may work.
                try:
                    self._turn(line)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    note(f"error: {error}")

    def _ask(self, question: str) -> str | None:
        """Read a line from the terminal; ``None`` at its end."""
        # It gives input() line editing and a history.
        with suppress(ImportError):
            import readline  # noqa: F401 - imported for its effect on input()
        try:
            if sys.stdout.isatty():
                return input(question).strip()
            # input() would write the question to stdout.
            write(sys.stderr, question)
            return input().strip()
        except EOFError:
            note("")
            return None

    def _turn(self, text: str) -> None:
        """Process a message of the user and all rounds of calls, up to the last answer."""
        messages = self._conversation.messages
        before = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            with self._interrupts.turn():
                for _ in range(_MAX_ROUNDS):
                    calls = self._answer()
                    if not calls:
                        return
                    messages += [self._result(call) for call in calls]
                note(f"stopped after {_MAX_ROUNDS} rounds of calls")
        except BaseException as error:
            # Discard the turn, so that the conversation can go on without it.
            del messages[before:]
            if not isinstance(error, KeyboardInterrupt) or not sys.stdin.isatty():
                raise
            note("\ninterrupted: this turn was discarded")

    def _answer(self) -> list[dict[str, Any]]:
        """Print the model's answer while it is generated, then its statistics.

        Returns:
            list[dict]: The calls in it; none if it was stopped.
        """
        args, thought, written = self._args, "", ""
        for delta in self._conversation.answer(
            args.max_tokens,
            sampler=self._sampler,
            stopped=lambda: self._interrupts.stopped,
            progress=PromptProgress(),
        ):
            self._interrupts.defer = True
            if delta.reasoning and args.thinking == "show":
                write(sys.stderr, delta.reasoning, dimmed=True)
                thought += delta.reasoning
            # Line feeds between a thought and the answer are not part of the answer.
            if content := delta.content if written else delta.content.lstrip("\n"):
                if not written:
                    end_line(sys.stderr, thought)
                write(sys.stdout, content)
                written += content
        self._interrupts.defer = False
        if written:
            end_line(sys.stdout, written)
        else:
            end_line(sys.stderr, thought)
        stopped = self._interrupts.stopped
        if self._conversation.last_response is not None:
            if stopped:
                note("stopped")
            elif self._conversation.last_response.finish_reason == "length":
                note(f"cut off after {args.max_tokens} tokens: --max-tokens allows more")
            note(_statistics(self._conversation.last_response))
            note(self._streaming.summary())
        return [] if stopped else self._conversation.messages[-1].get("tool_calls", [])

    def _result(self, call: dict[str, Any]) -> Message:
        """Run a call if the user agrees, and return the message with its result."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            self._tools.check_call(name, arguments)
        except ValueError as error:
            content = f"error: {error}"
        else:
            note(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            if self._args.yes or (self._ask("Run it? [y/N] ") or "").lower() in ("y", "yes"):
                with redirect_stdout(sys.stderr):
                    content = self._tools.call(name, arguments)
            else:
                content = "error: the user did not allow this call"
        note(content)
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}


class _Interrupts:
    """Handles Ctrl-C: between two tokens while an answer is decoded, which keeps its state, and otherwise at once.

    Attributes:
        stopped (bool): Ctrl-C was pressed while an answer was decoded.
        defer (bool): An answer is being decoded.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.defer = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle Ctrl-C here, and do not end the process when that takes a second."""
        handler, wakeup = signal.signal(signal.SIGINT, self._handle), signal.set_wakeup_fd(-1)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            signal.signal(signal.SIGINT, handler)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Begin a turn, in which nothing has been stopped yet."""
        self.stopped = False
        try:
            yield
        finally:
            self.defer = False

    def _handle(self, *_: Any) -> None:
        if self.stopped or not self.defer:
            raise KeyboardInterrupt
        self.stopped = True


def _statistics(last: GenerationResponse) -> str:
    return (
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec. "
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec. "
        f"Peak memory: {last.peak_memory:.3f} GB"
    )
