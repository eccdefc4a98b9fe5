"""A server of the demo model that the tests of this folder share."""

from collections.abc import Iterator

import openai
import pytest

from tests.support.serving import Running, serve


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    """Yield a running server with default settings."""
    with serve() as running:
        yield running


@pytest.fixture(scope="package")
def client(running: Running) -> openai.OpenAI:
    """Return OpenAI's client of the running server."""
    return running.client()
