"""Python functions of a file that a model may call."""

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from transformers.utils.chat_template_utils import (
    DocstringParsingException,
    TypeHintParsingException,
    get_json_schema,
)


class Toolbox:
    """Functions by name.

    Args:
        functions (Mapping[str, Callable]): typed, and documented in Google's style, each argument with a line.

    Attributes:
        schemas (list[dict]): what a chat template tells the model of them, in OpenAI's form.

    Raises:
        ValueError: one is not typed or documented; says which and what it lacks.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]):
        self._functions = dict(functions)
        self.schemas = [_schema(function) for function in self._functions.values()]

    @classmethod
    def load(cls, name: str) -> Self:
        """Run a Python file and take the functions that it defines; those that begin with ``_`` stay its own.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it does not run, has no functions, or one is not typed or documented.
        """
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such file of tools: {path}")
        module = _run(path)
        functions = {
            name: value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
        if not functions:
            raise ValueError(f"{path} defines no public function: there is no tool in it")
        try:
            return cls(functions)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. A helper that is no tool has a name that begins with _") from error

    def refuse_call(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Refuse what no function takes.

        Raises:
            ValueError: there is no such function, or it has other arguments.
        """
        if name not in self._functions:
            raise ValueError(f"there is no function {name!r}: choose from {', '.join(self._functions)}")
        try:
            inspect.signature(self._functions[name]).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Call a function.

        Returns:
            str: what it returned, as JSON unless it is text; or one line about the exception that it raised.
        """
        try:
            result = self._functions[name](**arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except (Exception, SystemExit) as error:  # whatever goes wrong in it is for the model to know
            return " ".join(f"error: {type(error).__name__}: {error}".split())


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} does not run: {type(error).__name__}: {error}") from error
    return module


def _schema(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, json.JSONDecodeError) as error:
        raise ValueError(f"{function.__name__} cannot be a tool: {error}") from error
    return schema
