"""Tokenizers of the demo model, with either format of calls."""

from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load as load_tokenizer
from mlx_lm.tool_parsers import json_tools

from flashmoe_mlx import constrain
from tests.constrain.writing import Writer


@pytest.fixture(scope="session")
def xml_tokenizer():
    return load_tokenizer(Path("demo/model"))


@pytest.fixture(scope="session")
def hermes_tokenizer():
    tokenizer = load_tokenizer(Path("demo/model"))
    tokenizer._tool_parser = json_tools.parse_tool_call
    return tokenizer


@pytest.fixture(scope="session", params=["xml", "hermes"])
def any_tokenizer(request):
    return request.getfixturevalue(f"{request.param}_tokenizer")


@pytest.fixture(scope="session")
def vocabulary(xml_tokenizer):
    return constrain.vocabulary_of(xml_tokenizer)


@pytest.fixture(scope="session")
def writer(any_tokenizer, vocabulary):
    return Writer(any_tokenizer, vocabulary)
