"""What load() set up, found at model.streaming."""

from dataclasses import dataclass
from pathlib import Path

from flashmoe_mlx.model.context import (
    quantized_share,
    refuse_context,
)
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.warm_start import save_residents


@dataclass(frozen=True)
class Streaming:
    """What :func:`load` set up, found at ``model.streaming``.

    Args:
        counters (Counters): hits, misses, bytes and seconds so far.
        experts_per_token (int): routed experts a token uses.
        native_experts_per_token (int): how many the checkpoint asks for.
        trunk_nbytes (int): bytes of memory for everything but routed experts.
        slots_nbytes (int): bytes of memory for routed experts.
        experts_nbytes (int): bytes that all routed experts would take.
        pools (tuple[Pool, ...]): the slots of the layers that are not all in memory.
        prefill_step_size (int): tokens of a prompt to process at a time with the memory that was free. The commands
            use it; from Python pass it on, e.g. to ``mlx_lm.generate(...,
            prefill_step_size=model.streaming.prefill_step_size)``, because mlx-lm's own default is always 2048.
        itemsize (int): bytes of a value as the model computes it.
        kv_token_nbytes (int): bytes that each token of a context needs in the KV cache.
    """

    counters: Counters
    experts_per_token: int
    native_experts_per_token: int
    trunk_nbytes: int
    slots_nbytes: int
    experts_nbytes: int
    pools: tuple[Pool, ...]
    prefill_step_size: int
    itemsize: int
    kv_token_nbytes: int

    def save_residents(self, path: str | Path) -> None:
        """Write which experts are in memory, for a ``warm_start`` of the next run.

        Raises:
            OSError: the file cannot be written.
        """
        save_residents(path, self.pools)

    def refuse_context(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> None:
        """Refuse a context that memory cannot hold, as the commands do before they begin.

        Args:
            tokens (int): of prompt and answer.
            kv_bits (int, optional): of a quantised KV cache. Default: ``None``, it is not.
            kv_group_size (int): values of a quantised KV cache that share a scale and a bias. Default: ``64``.

        Raises:
            MemoryError: the KV cache of so many tokens does not fit into free memory.
        """
        token_nbytes: float = self.kv_token_nbytes
        if kv_bits is not None:
            token_nbytes *= quantized_share(kv_bits, kv_group_size, self.itemsize)
        refuse_context(tokens, token_nbytes)

    def memory(self) -> str:
        """One line for people about memory, e.g. ``18.0 GB of 217.4 GB of experts in memory, 5.5 GB of trunk``."""
        slots, experts, trunk = (n / 1e9 for n in (self.slots_nbytes, self.experts_nbytes, self.trunk_nbytes))
        return f"{slots:.1f} GB of {experts:.1f} GB of experts in memory, {trunk:.1f} GB of trunk"

    def summary(self) -> str:
        """The ``Experts:`` line."""
        all_resident = self.slots_nbytes == self.experts_nbytes
        line = f"Experts: {'all in memory' if all_resident else self.counters.summary()}"
        if given_back := sum((pool.planned - pool.slots) * pool.slot_nbytes for pool in self.pools):
            line += f", {given_back / 1e9:.2f} GB given back because memory ran short"
        if self.experts_per_token != self.native_experts_per_token:
            line += f", {self.experts_per_token} experts per token instead of {self.native_experts_per_token}"
        return line
