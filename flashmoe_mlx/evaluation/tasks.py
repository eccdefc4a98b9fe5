"""Tasks with one right answer: texts to recall and tools to call."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from flashmoe_mlx.evaluation.metrics import Estimate, share
from flashmoe_mlx.generation.output_parser import OutputParser
from flashmoe_mlx.generation.prompt import Prompt
from flashmoe_mlx.system.text import check_text, read_text

_KINDS = {"recall": str, "tool": dict}
_FIELDS = {"kind", "messages", "tools", "expect"}


@dataclass(frozen=True)
class Task:
    """One question and its answer.

    Args:
        messages (list[dict]): The chat so far, as the model's chat template takes it.
        tools (list[dict], optional): Tools that the model may call, in OpenAI's format.
        expect (str or dict): The answer word for word, or the call as ``{"name": ..., "arguments": {...}}``.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    expect: str | dict[str, Any]

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a task. It may have one more field, ``kind``, which is ``recall`` or ``tool``.

        Raises:
            ValueError: The line is not JSON, or a field is missing, unknown or of another type.
        """
        task = json.loads(line)
        if not isinstance(task, dict) or set(task) - _FIELDS or not {"messages", "expect"} <= set(task):
            raise ValueError(
                f"a task must have messages and expect, and may have no other fields than {', '.join(sorted(_FIELDS))}"
            )
        expect = task["expect"]
        kind = task.get("kind", "recall" if isinstance(expect, str) else "tool")
        if kind not in _KINDS or not isinstance(expect, _KINDS[kind]):
            raise ValueError("kind must be recall, with a text to expect, or tool, with a call to expect")
        if isinstance(expect, dict) and (set(expect) != {"name", "arguments"} or not task.get("tools")):
            raise ValueError("a tool task must have tools, and expect a call with name and arguments")
        messages = task["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise ValueError("messages must be a list of at least one message, each with a role")
        # JSON may write half of a surrogate pair.
        check_text("it", json.dumps(task, ensure_ascii=False))
        return cls(task["messages"], task.get("tools"), expect)


@dataclass(frozen=True)
class TaskScores:
    """Shares of correct answers by kind of task. ``None`` if there was no task of a kind.

    Args:
        recall (Estimate, optional): Answers that are the expected text.
        calls_parse (Estimate, optional): Answers with tool calls that parse and name known tools.
        calls_right (Estimate, optional): Answers with exactly the expected call.
    """

    recall: Estimate | None
    calls_parse: Estimate | None
    calls_right: Estimate | None

    @classmethod
    def of(cls, tasks: Sequence[Task], answers: Sequence[str], tokenizer: TokenizerWrapper) -> Self:
        """Score answers.

        Args:
            tasks (Sequence[Task]): The tasks.
            answers (Sequence[str]): The model's answer to each.
            tokenizer (TokenizerWrapper): Of the model, with its tool parser.
        """
        pairs = list(zip(tasks, answers, strict=True))
        recalled = [
            final(answer, tokenizer) == task.expect.strip() for task, answer in pairs if isinstance(task.expect, str)
        ]
        calls = [
            (task, tool_calls(answer, task.tools, tokenizer)) for task, answer in pairs if isinstance(task.expect, dict)
        ]
        return cls(
            _share(recalled),
            _share([bool(found) for _, found in calls]),
            _share([found == [task.expect] for task, found in calls]),
        )


def read_tasks(path: Path) -> list[Task]:
    """Read a file with one task in JSON per line. Empty lines are skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A line is not a task, or there is none.
    """
    tasks = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            try:
                tasks.append(Task.from_json(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not tasks:
        raise ValueError(f"{path} has no tasks")
    return tasks


def check_answerable(tasks: Sequence[Task], tokenizer: TokenizerWrapper, folder: Path) -> None:
    """Refuse tasks that a model cannot be given.

    Raises:
        ValueError: There is no chat template, or there are tools and no tool parser.
    """
    if tasks and tokenizer.chat_template is None:
        raise ValueError(f"{folder} has no chat template: tasks need a chat model")
    if any(task.tools for task in tasks) and not tokenizer.has_tool_calling:
        raise ValueError(f"mlx-lm has no tool parser for {folder}: leave out tasks with tools")


def answer(model: nn.Module, tokenizer: TokenizerWrapper, task: Task, max_tokens: int) -> str:
    """Return a streamed model's greedy answer of up to ``max_tokens`` tokens."""
    prompt = Prompt.from_messages(task.messages, tokenizer, task.tools or ()).tokens
    step = model.streaming.plan_prefill(len(prompt)).step_size
    text: str = mlx_lm.generate(model, tokenizer, prompt, max_tokens=max_tokens, prefill_step_size=step)
    return text


def final(text: str, tokenizer: TokenizerWrapper) -> str:
    """Return an answer without the model's reasoning and surrounding space."""
    if tokenizer.has_thinking:
        text = text.rpartition(tokenizer.think_end)[2]
    return text.strip()


def tool_calls(text: str, tools: list[dict[str, Any]] | None, tokenizer: TokenizerWrapper) -> list[dict[str, Any]]:
    """Return the calls in an answer, or an empty list if one of them does not parse or names an unknown tool.

    Args:
        text (str): The answer.
        tools (list[dict], optional): Known tools, in OpenAI's format.
        tokenizer (TokenizerWrapper): Has mlx-lm's parser of the model's call format.

    Returns:
        list[dict]: Calls as ``{"name": ..., "arguments": {...}}``.
    """
    if not tokenizer.has_tool_calling:
        return []
    delta = OutputParser(tokenizer, tools=tools or ()).feed(final(text, tokenizer), last=True)
    functions = [call["function"] for call in delta.tool_calls]
    known = {tool["function"]["name"] for tool in tools or []}
    # A call that does not parse stays in the content.
    if tokenizer.tool_call_start in delta.content or any(function["name"] not in known for function in functions):
        return []
    return [{"name": function["name"], "arguments": json.loads(function["arguments"])} for function in functions]


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str)


def _share(successes: list[bool]) -> Estimate | None:
    return share(sum(successes), len(successes)) if successes else None
