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


class PythonTools:
    """Functions by name.

    Args:
        functions (Mapping[str, Callable]): Functions with type hints and Google-style docstrings.

    Attributes:
        schemas (list[dict]): The functions in OpenAI's form, as chat templates take them.

    Raises:
        ValueError: A function has a parameter without type hint or description.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]):
        self._functions = dict(functions)
        self.schemas = [_schema(function) for function in self._functions.values()]

    @classmethod
    def load(cls, name: str) -> Self:
        """Run a Python file and take the public functions that it defines.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file does not run, has no functions, or one lacks a type hint or a description.
        """
        path = Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        module = _run(path)
        functions = {
            name: value
            for name, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
        }
        if not functions:
            raise ValueError(f"{path} has no public functions: define at least one")
        try:
            return cls(functions)
        except ValueError as error:
            raise ValueError(f"{path}: {error}. Prefix helper functions with an underscore to hide them") from error

    def check_call(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Check that a call fits one of the functions.

        Raises:
            ValueError: There is no such function, or it takes other arguments.
        """
        if name not in self._functions:
            choice = f"choose from {', '.join(self._functions)}" if self._functions else "there are no functions"
            raise ValueError(f"no function {name!r}: {choice}")
        try:
            inspect.signature(self._functions[name]).bind(**arguments)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from error

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Call a function.

        Returns:
            str: Its result, as JSON unless it is text; or one line about the exception that it raised.
        """
        try:
            result = self._functions[name](**arguments)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        # Any failure is reported to the model, which may try again.
        except (Exception, SystemExit) as error:
            return " ".join(f"error: {type(error).__name__}: {error}".split())


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: its name must end in .py")
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
