"""Python functions that a model may call."""

from pathlib import Path
from typing import Any

import pytest

from flashmoe_mlx.generation.python_tools import PythonTools

SOURCE = '''
import math

def area(radius: float, unit: str = "m2") -> dict:
    """The area of a circle.

    Args:
        radius: Radius of the circle
        unit: Unit of the area
    """
    if radius < 0:
        raise ValueError("a negative\\nradius")
    return {"area": round(math.pi * radius**2, 2), "unit": unit}

def _helper():
    pass
'''


@pytest.fixture
def tools(tmp_path: Path) -> PythonTools:
    path = tmp_path / "tools.py"
    path.write_text(SOURCE)
    return PythonTools.load(str(path))


def test_public_functions_of_a_file_are_tools(tools: PythonTools) -> None:
    (schema,) = tools.schemas
    assert schema["function"]["name"] == "area"
    assert schema["function"]["parameters"]["required"] == ["radius"]


@pytest.mark.parametrize("arguments", [{}, {"radius": 1.0, "planet": "Mars"}])
def test_a_call_with_missing_or_unknown_arguments_is_refused(tools: PythonTools, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="area: "):
        tools.check_call("area", arguments)


def test_a_call_of_an_unknown_function_is_refused(tools: PythonTools) -> None:
    with pytest.raises(ValueError, match="no function 'rm'"):
        tools.check_call("rm", {})
    with pytest.raises(ValueError, match="there are no functions"):
        PythonTools({}).check_call("rm", {})


def test_results_are_json_and_exceptions_one_line(tools: PythonTools) -> None:
    assert tools.call("area", {"radius": 2.0}) == '{"area": 12.57, "unit": "m2"}'
    assert tools.call("area", {"radius": -1.0}) == "error: ValueError: a negative radius"
