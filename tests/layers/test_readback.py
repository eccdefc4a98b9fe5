"""What the GPU tells the host by letter is what it chose, and a letter that is lost costs nothing but time."""

import mlx.core as mx
import numpy as np
import pytest

from flashmoe_mlx.layers import readback as mailbox
from flashmoe_mlx.layers.readback import Mailbox
from flashmoe_mlx.model import swap as model
from flashmoe_mlx.streaming.pinned_memory import PinnedBuffers
from tests.conftest import WriteFamily
from tests.support.oracle import assert_same, resident, run, streamed
from tests.support.pinned import HostBuffers


class HostMailbox(Mailbox):
    """A mailbox without a GPU: the host writes what the kernel would, if the letter is not to be lost."""

    arrives = True
    taken: list[list[int] | None]

    def __init__(self) -> None:
        super().__init__()
        self.taken = []

    def take(self) -> list[int] | None:
        self.taken.append(super().take())
        return self.taken[-1]

    def _staging(self) -> PinnedBuffers:
        return HostBuffers(8 * 1024, 1)

    def _write(self, numbers: mx.array, letter: mx.array) -> mx.array:
        if self.arrives:
            for i, number in enumerate(np.asarray(numbers).ravel().tolist()):
                self._words[i] = letter.item() << 32 | number
        return letter


def test_letters() -> None:
    box = HostMailbox()
    for numbers in ([[7, 0, 511]], [[2**32 - 1]], [list(range(40))]):
        box.post(mx.array(numbers, mx.uint32))
        assert box.take() == numbers[0]
    assert box.post(mx.zeros((1025,), mx.uint32)) is None


def test_an_old_letter_is_not_taken_for_a_new_one() -> None:
    box = HostMailbox()
    box.post(mx.array([1, 2, 3, 4]))
    box.post(mx.array([5, 6]))
    box.arrives = False
    box.post(mx.array([7, 8, 9]))
    assert box.take() is None
    box._words[0] = box._letter << 32 | 7  # on its way
    assert box.take() is None


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("family", ["qwen3_5_moe", "gpt_oss"])
def test_the_same_tokens(family: str, arrives: bool, checkpoint: WriteFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes: list[HostMailbox] = []
    fence = model.Fence
    monkeypatch.setattr(model, "Fence", lambda counters, _: fence(counters, boxes.append(HostMailbox()) or boxes[-1]))
    monkeypatch.setattr(HostMailbox, "arrives", arrives)
    monkeypatch.setattr(mailbox, "_PATIENCE", 1e-5)
    folder = checkpoint(family)
    assert_same(run(streamed(folder, 0.25)), run(resident(folder)))
    assert boxes[-1].taken
    assert all((numbers is not None) == arrives for numbers in boxes[-1].taken)
