"""Questions with one right answer: texts that must be recalled, and tools that must be called."""

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

_KINDS = {"recall": str, "tool": dict}
_FIELDS = {"kind", "messages", "tools", "expect"}


@dataclass(frozen=True)
class Task:
    """One question.

    Args:
        messages (list[dict]): the chat so far, as the model's chat template takes it.
        tools (list[dict], optional): what the model may call, in OpenAI's form.
        expect (str or dict): the answer word for word, or the call as ``{"name": ..., "arguments": {...}}``.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    expect: str | dict[str, Any]

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read a task; besides its own fields it may name its ``kind``, ``recall`` or ``tool``.

        Raises:
            ValueError: it is not JSON, or a field is missing, unknown or of another type.
        """
        task = json.loads(line)
        if not isinstance(task, dict) or set(task) - _FIELDS or not {"messages", "expect"} <= set(task):
            raise ValueError(f"a task has messages and expect, and maybe {', '.join(sorted(_FIELDS))}; nothing else")
        expect = task["expect"]
        kind = task.get("kind", "recall" if isinstance(expect, str) else "tool")
        if kind not in _KINDS or not isinstance(expect, _KINDS[kind]):
            raise ValueError("expect is a text in a recall task, and a call in a tool task; there is no other kind")
        if isinstance(expect, dict) and (set(expect) != {"name", "arguments"} or not task.get("tools")):
            raise ValueError("a tool task has tools, and expects a call with name and arguments")
        if not isinstance(task["messages"], list) or not task["messages"]:
            raise ValueError("messages is a list of at least one")
        return cls(task["messages"], task.get("tools"), expect)


@dataclass(frozen=True)
class Marks:
    """How a model did, as shares of the tasks of a kind; ``None`` if there were none of it.

    Args:
        recall (Estimate, optional): answers that are the expected text.
        calls_parse (Estimate, optional): answers with tool calls that can be read, of tools that exist.
        calls_right (Estimate, optional): answers with just the expected call.
    """

    recall: Estimate | None
    calls_parse: Estimate | None
    calls_right: Estimate | None

    @classmethod
    def of(cls, tasks: Sequence[Task], answers: Sequence[str], tokenizer: TokenizerWrapper) -> Self:
        """Judge the answers to tasks.

        Args:
            tasks (Sequence[Task]): the questions.
            answers (Sequence[str]): what the model said, one each.
            tokenizer (TokenizerWrapper): of the model; it knows how the model calls tools.
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
    """Read a file with a task a line, in JSON; empty lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not a task, or there is none.
    """
    tasks = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                tasks.append(Task.from_json(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not tasks:
        raise ValueError(f"{path} has no tasks")
    return tasks


def answer(model: nn.Module, tokenizer: TokenizerWrapper, task: Task, max_tokens: int) -> str:
    """What a streamed model says, always its likeliest token, up to ``max_tokens``."""
    prompt = tokenizer.apply_chat_template(task.messages, tools=task.tools, add_generation_prompt=True)
    step = model.streaming.prefill_step_size
    text: str = mlx_lm.generate(model, tokenizer, prompt, max_tokens=max_tokens, prefill_step_size=step)
    return text


def final(text: str, tokenizer: TokenizerWrapper) -> str:
    """An answer without the model's thinking and the space around it."""
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


def _share(successes: list[bool]) -> Estimate | None:
    return share(sum(successes), len(successes)) if successes else None
