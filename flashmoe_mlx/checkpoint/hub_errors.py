"""Errors of the Hugging Face Hub, in one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HfHubHTTPError, HFValidationError


@contextmanager
def one_line_hub_errors(failed: str) -> Iterator[None]:
    """Raise an error of the hub, which may have many lines, as one line that begins with ``failed``.

    Raises:
        OSError: The hub cannot be reached, refuses the request, or has no such repository.
    """
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OSError(f"{failed} ({reason}): check the name and the network") from error
