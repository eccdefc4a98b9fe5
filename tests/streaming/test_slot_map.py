"""The slot map against a model of it: a plain list of residents, and the slots that are handed out."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flashmoe_mlx.streaming.slot_map import NO_SLOT, Key, SlotMap

EXPERTS = 5
LAYER = st.sampled_from(["a", "b"])
NUMBERS = st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1)


class SlotMapModel(RuleBasedStateMachine):
    """Calls a slot map at random, and compares it with the model after each call."""

    @initialize(capacity=st.integers(1, 7))
    def start(self, capacity: int) -> None:
        self.slots = SlotMap(capacity)
        self.capacity = capacity
        # Least recently used first.
        self.residents: list[Key] = []
        self.slot_of: dict[Key, int] = {}
        self.handed_out: list[int] = []

    @rule(layer=LAYER, experts=NUMBERS)
    def fetch(self, layer: str, experts: list[int]) -> None:
        """Make experts resident, as a pool does."""
        missing = self.slots.missing(layer, experts)
        self.use([(layer, expert) for expert in experts if expert not in missing])
        free = self.capacity - len(self.residents) - len(self.handed_out)
        if len(experts) <= self.capacity - len(self.handed_out):
            slots, evicted = self.slots.take(len(missing))
            self.slots.insert([(layer, expert) for expert in missing], slots)
            assert evicted == self.evict(len(missing) - free)
            self.residents += [(layer, expert) for expert in missing]
            self.slot_of |= {(layer, expert): slot for expert, slot in zip(missing, slots, strict=True)}

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def touch(self, data: Any) -> None:
        layer, _ = data.draw(st.sampled_from(self.residents))
        resident = [key for key in self.residents if key[0] == layer]
        keys = data.draw(st.lists(st.sampled_from(resident), unique=True))
        assert self.slots.touch(layer, [expert for _, expert in keys])
        self.use(keys)

    @rule(layer=LAYER, experts=NUMBERS)
    def touch_any(self, layer: str, experts: list[int]) -> None:
        """If one expert is missing, none of the others is marked."""
        keys = [(layer, expert) for expert in experts]
        resident = all(key in self.slot_of for key in keys)
        assert self.slots.touch(layer, experts) == resident
        if resident:
            self.use(keys)

    @rule(layer=LAYER, experts=NUMBERS)
    def missing(self, layer: str, experts: list[int]) -> None:
        missing = [expert for expert in experts if (layer, expert) not in self.slot_of]
        assert self.slots.missing(layer, experts) == missing
        self.use([(layer, expert) for expert in experts if expert not in missing])

    @rule(count=st.integers(0, 8))
    def take(self, count: int) -> None:
        free = self.capacity - len(self.residents) - len(self.handed_out)
        if count > free + len(self.residents):
            with pytest.raises(OSError, match=f"{len(self.handed_out)} of {self.capacity} slots are blocked"):
                self.slots.take(count)
            return
        slots, evicted = self.slots.take(count)
        assert len(slots) == count
        assert evicted == self.evict(count - free)
        self.handed_out += slots

    @precondition(lambda self: self.handed_out)
    @rule(layer=LAYER, expert=st.integers(0, EXPERTS - 1))
    def insert(self, layer: str, expert: int) -> None:
        if (layer, expert) not in self.slot_of:
            slot = self.handed_out.pop()
            self.slots.insert([(layer, expert)], [slot])
            self.residents.append((layer, expert))
            self.slot_of[layer, expert] = slot

    @rule(count=st.integers(0, 8))
    def release(self, count: int) -> None:
        slots, self.handed_out = self.handed_out[:count], self.handed_out[count:]
        self.slots.release(slots)

    @precondition(lambda self: self.residents)
    @rule(data=st.data())
    def demote(self, data: Any) -> None:
        keys = data.draw(st.lists(st.sampled_from(self.residents), unique=True))
        self.slots.demote(keys)
        for key in keys:
            self.residents.remove(key)
            self.residents.insert(0, key)

    @precondition(lambda self: not self.handed_out)
    @rule(capacity=st.integers(1, 7))
    def resize(self, capacity: int) -> None:
        before = self.slot_of
        self.slots, moved = self.slots.resized(capacity)
        self.capacity = capacity
        self.residents = self.residents[-capacity:]
        assert moved == [before[key] for key in self.residents]
        self.slot_of = {key: slot for slot, key in enumerate(self.residents)}

    @invariant()
    def agrees(self) -> None:
        assert self.slots.capacity == self.capacity
        assert self.slots.residents == self.residents
        for layer in ("a", "b"):
            wanted = [self.slot_of.get((layer, expert), NO_SLOT) for expert in range(EXPERTS)]
            assert self.slots.slots_of(layer, EXPERTS) == wanted
            resident, missing = self.slots.partition(layer, range(EXPERTS))
            assert resident == [expert for expert in range(EXPERTS) if (layer, expert) in self.slot_of]
            assert missing == [expert for expert in range(EXPERTS) if (layer, expert) not in self.slot_of]
            assert self.slots.lookup(layer, resident) == {expert: self.slot_of[layer, expert] for expert in resident}
        used = [*self.slot_of.values(), *self.handed_out]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(self.capacity))

    def evict(self, count: int) -> list[Key]:
        """Remove the least recently used experts from the model, and return them."""
        evicted = self.residents[: max(0, count)]
        self.residents = self.residents[len(evicted) :]
        for key in evicted:
            del self.slot_of[key]
        return evicted

    def use(self, keys: list[Key]) -> None:
        for key in keys:
            self.residents.remove(key)
            self.residents.append(key)


TestSlotMap = SlotMapModel.TestCase
TestSlotMap.settings = settings(deadline=None, derandomize=True, max_examples=150, stateful_step_count=40)
