"""Talk with a model whose experts are streamed, and let it call functions of yours.

python -m flashmoe_mlx.chat --model FOLDER_OR_REPO --tools my_tools.py
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import mlx.core as mx
from mlx_lm import chat as mlx_chat
from mlx_lm.generate import GenerationResponse
from mlx_lm.sample_utils import make_sampler

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import PromptProgress
from flashmoe_mlx.cli.run import finish, streamed_load
from flashmoe_mlx.config import Config
from flashmoe_mlx.generation.conversation import Conversation, Message
from flashmoe_mlx.generation.python_tools import Toolbox

EPILOG = """examples:
  python -m flashmoe_mlx.chat --model mlx-community/Qwen3.5-397B-A17B-4bit --config exact --ram-budget 20GB
  python -m flashmoe_mlx.chat --tools my_tools.py
  python -m flashmoe_mlx.chat < questions.txt > answers.txt

Ctrl-C stops an answer; where you are asked for a line, it ends the program. A line with q, r or h alone quits, begins a
new conversation, or shows help. If stdin is not a terminal, each line is a turn. Answers go to stdout, all else to
stderr.
"""
HELP = "Ctrl-C stops an answer. A line with q alone quits, r begins a new conversation, h shows this."

_MOST_ROUNDS = 16  # of calls in one turn: a model that does not come to an end is stopped
_SHOWN = str.maketrans(dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "�"))


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx_lm.chat's parser with the flags of expert streaming, of tools and of thinking."""
    description = "Talk with a Mixture-of-Experts model whose experts stay on disk."
    parser = extend_parser(mlx_chat.setup_arg_parser(), description, EPILOG)
    parser.add_argument("--top-k", type=int, default=0, help="Sampling top-k (default: 0, off)")
    parser.add_argument("--min-p", type=float, default=0.0, help="Sampling min-p (default: 0, off)")
    parser.add_argument(
        "--thinking",
        choices=["show", "hide", "off"],
        default="show",
        help="What becomes of the model's thoughts: shown dimmed, hidden, or it is told not to think (default: show)",
    )
    group = parser.add_argument_group("tools")
    group.add_argument(
        "--tools",
        metavar="FILE",
        help="A Python file. It is run, and the model may call its public functions, which must have type hints and "
        "docstrings in Google's style. You are shown each call and asked before it runs",
    )
    group.add_argument(
        "--yes",
        action="store_true",
        help="Run each call without asking: the model decides alone what your functions do. Needed with --tools if "
        "stdin is not a terminal",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _chat(setup_arg_parser(), argv)


def _chat(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    args, config = parse_arguments(parser, argv)
    if args.pipeline:
        raise ValueError("--pipeline is for a model on several machines, and this one runs on one: leave it out")
    if args.max_tokens < 1:
        raise ValueError(f"max_tokens is {args.max_tokens}: it must be a whole number from 1 on")
    if args.tools is not None and not args.yes and not sys.stdin.isatty():
        raise ValueError(
            "nobody can be asked before a tool runs, as stdin is not a terminal: pass --yes to run them all"
        )
    toolbox = Toolbox({}) if args.tools is None else Toolbox.load(args.tools)
    mx.random.seed(args.seed)
    _Chat(args, config, toolbox).run()


class _Chat:
    """What happens between a person or a pipe and a conversation."""

    def __init__(self, args: argparse.Namespace, config: Config, toolbox: Toolbox):
        self._args, self._config, self._toolbox = args, config, toolbox
        trust = args.trust_remote_code
        load = streamed_load(args, config)
        self._model, self._tokenizer = load(
            args.model,
            adapter_path=args.adapter_path,
            tokenizer_config={"trust_remote_code": trust},
            trust_remote_code=trust,
        )
        self._interrupts = _Interrupts()
        self._conversation = self._begin()
        self._sampler = make_sampler(
            args.temp,
            args.top_p,
            args.min_p,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=[*self._tokenizer.encode("\n"), *self._tokenizer.eos_token_ids],
        )
        if args.tools is not None and not self._conversation.holds_calls:
            _note("this model's calls, or these schemas, are not known here: calls may not fit their schemas")

    def run(self) -> None:
        """Take turns until there are no more."""
        try:
            if sys.stdin.isatty():
                _note(HELP)
                with self._interrupts.heard():
                    self._talk()
            else:
                for line in sys.stdin:
                    if line.strip():
                        self._turn(line.rstrip("\n"))
        finally:
            finish(self._model.streaming, self._config, verbose=False)

    def _begin(self) -> Conversation:
        system = self._args.system_prompt
        return Conversation(
            self._model,
            self._tokenizer,
            [] if system is None else [{"role": "system", "content": system}],
            self._toolbox.schemas,
            {"enable_thinking": False} if self._args.thinking == "off" else {},
            self._args.max_kv_size,
        )

    def _talk(self) -> None:
        while (line := self._ask("> ")) not in (None, "q"):
            if line == "h":
                _note(HELP)
            elif line == "r":
                self._conversation = self._begin()
                _note("a new conversation")
            elif line:
                try:
                    self._turn(line)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:  # of this turn; the next may work
                    _note(f"error: {error}")

    def _ask(self, question: str) -> str | None:
        """A line from the terminal, or ``None`` at its end."""
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its keys and its history
        try:
            if sys.stdout.isatty():
                return input(question).strip()
            _write(sys.stderr, question)  # input() would write it to stdout
            return input().strip()
        except EOFError:
            _note("")
            return None

    def _turn(self, text: str) -> None:
        """One message of the user, and all that follows until it is the user's turn again."""
        messages = self._conversation.messages
        before = len(messages)
        messages.append({"role": "user", "content": text})
        try:
            with self._interrupts.of_a_turn():
                for _ in range(_MOST_ROUNDS):
                    calls = self._answer()
                    if not calls:
                        return
                    messages += [self._result(call) for call in calls]
                _note(f"stopped after {_MOST_ROUNDS} rounds of calls")
        except BaseException as error:
            del messages[before:]  # as if nothing had been said
            if not isinstance(error, KeyboardInterrupt) or not sys.stdin.isatty():
                raise
            _note("\nstopped: this turn is forgotten")

    def _answer(self) -> list[dict[str, Any]]:
        """Print the model's answer while it comes, then its statistics.

        Returns:
            list[dict]: the calls in it; none if it was stopped.
        """
        args, thought, written = self._args, "", ""
        for piece in self._conversation.answer(
            args.max_tokens,
            lambda: self._interrupts.stopped,
            sampler=self._sampler,
            prefill_step_size=args.prefill_step_size or self._model.streaming.prefill_step_size,
            prompt_progress_callback=PromptProgress(),
        ):
            self._interrupts.wait_for_token = True
            if piece.reasoning and args.thinking == "show":
                _write(sys.stderr, piece.reasoning, dimmed=True)
                thought += piece.reasoning
            if content := piece.content if written else piece.content.lstrip("\n"):  # which end a thought
                if not written:
                    _end_line(sys.stderr, thought)
                _write(sys.stdout, content)
                written += content
        self._interrupts.wait_for_token = False
        _end_line(*((sys.stdout, written) if written else (sys.stderr, thought)))
        stopped = self._interrupts.stopped
        if self._conversation.last is not None:
            if stopped:
                _note("stopped")
            elif self._conversation.last.finish_reason == "length":
                _note(f"cut off after {args.max_tokens} tokens: --max-tokens allows more")
            _note(_figures(self._conversation.last))
            _note(self._model.streaming.summary())
        return [] if stopped else self._conversation.messages[-1].get("tool_calls", [])

    def _result(self, call: dict[str, Any]) -> Message:
        """The message with what came of a call, once the user has agreed to it."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        try:
            self._toolbox.refuse_call(name, arguments)
        except ValueError as error:
            content = f"error: {error}"
        else:
            _note(f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
            if self._args.yes or (self._ask("Run it? [y/N] ") or "").lower() in ("y", "yes"):
                with redirect_stdout(sys.stderr):
                    content = self._toolbox.call(name, arguments)
            else:
                content = "error: the user did not allow this call"
        _note(content)
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}


class _Interrupts:
    """Ctrl-C: takes effect between two tokens while the model speaks, which spares the state, and else at once.

    Attributes:
        stopped (bool): it came while the model spoke.
        wait_for_token (bool): the model speaks.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.wait_for_token = False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear Ctrl-C here, instead of ending the program if it takes a second to take effect."""
        before, ear = signal.signal(signal.SIGINT, self._hear), signal.set_wakeup_fd(-1)
        try:
            yield
        finally:
            signal.set_wakeup_fd(ear)
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def of_a_turn(self) -> Iterator[None]:
        """Begin a turn, in which nothing has been stopped yet."""
        self.stopped = False
        try:
            yield
        finally:
            self.wait_for_token = False

    def _hear(self, *_: Any) -> None:
        if self.stopped or not self.wait_for_token:
            raise KeyboardInterrupt
        self.stopped = True


def _figures(last: GenerationResponse) -> str:
    return (
        f"Prompt: {last.prompt_tokens} tokens, {last.prompt_tps:.3f} tokens-per-sec. "
        f"Generation: {last.generation_tokens} tokens, {last.generation_tps:.3f} tokens-per-sec. "
        f"Peak memory: {last.peak_memory:.3f} GB"
    )


def _end_line(file: TextIO, text: str) -> None:
    if text and not text.endswith("\n"):
        _write(file, "\n")


def _note(text: str) -> None:
    _write(sys.stderr, text, dimmed=True)
    _write(sys.stderr, "\n")


def _write(file: TextIO, text: str, dimmed: bool = False) -> None:
    """Write at once; to a terminal, nothing that could command it."""
    if file.isatty():
        text = text.translate(_SHOWN)
        text = f"\x1b[2m{text}\x1b[0m" if dimmed else text
    file.write(text)
    file.flush()
