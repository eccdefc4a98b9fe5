"""Sizes and counters of a streamed model, found at ``model.streaming``."""

from dataclasses import dataclass
from pathlib import Path

from flashmoe_mlx.model.context import quantized_share, refuse_context
from flashmoe_mlx.model.prefill import ChunkMemory, PrefillPlan, fewest_tokens
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.pool import Pool
from flashmoe_mlx.streaming.warm_start import save_residents
from flashmoe_mlx.system.memory import available_memory, memory_reserve
from flashmoe_mlx.system.metal import max_buffer_nbytes


@dataclass(frozen=True)
class Streaming:
    """Sizes and counters of a streamed model. :func:`flashmoe_mlx.load` puts it at ``model.streaming``.

    Args:
        counters (Counters): Hits, misses, bytes and seconds so far.
        experts_per_token (int): Routed experts per token.
        native_experts_per_token (int): The checkpoint's own number.
        trunk_nbytes (int): Bytes of memory for everything but routed experts.
        slots_nbytes (int): Bytes of memory for routed experts.
        experts_nbytes (int): Bytes that all routed experts would take in memory.
        pools (tuple[Pool, ...]): Of the layers that are not fully resident.
        prefill_step_size (int): Most tokens of a prefill chunk, by the memory that was free. The commands use
            :meth:`plan_prefill`, which also knows the prompt; in Python pass that on, e.g. to
            ``mlx_lm.generate(..., prefill_step_size=model.streaming.plan_prefill(len(prompt)).step_size)``, because
            mlx-lm's own default is always 2048.
        chunk_memory (ChunkMemory): Bytes of a prefill chunk.
        itemsize (int): Bytes of an activation.
        kv_token_nbytes (int): Bytes per token of the KV cache.
        kernels (bool): ``False`` if the settings ask for MLX operations alone.
        kv_layers (int): Layers that these bytes are of.
    """

    counters: Counters
    experts_per_token: int
    native_experts_per_token: int
    trunk_nbytes: int
    slots_nbytes: int
    experts_nbytes: int
    pools: tuple[Pool, ...]
    prefill_step_size: int
    chunk_memory: ChunkMemory
    itemsize: int
    kv_token_nbytes: int
    kernels: bool
    kv_layers: int

    def save_residents(self, path: str | Path) -> None:
        """Write which experts are in memory, for a warm start of the next run.

        Args:
            path (str or Path): The file, for ``Config.warm_start``.

        Raises:
            OSError: The file cannot be written.
        """
        save_residents(path, self.pools)

    def refuse_context(self, tokens: int, kv_bits: int | None = None, kv_group_size: int = 64) -> None:
        """Refuse a context that does not fit in memory, as the commands do before they begin.

        Args:
            tokens (int): Of prompt and answer.
            kv_bits (int, optional): Of a quantized KV cache. Default: ``None``, it is not quantized.
            kv_group_size (int): Group size of a quantized KV cache. Default: ``64``.

        Raises:
            MemoryError: The KV cache of that many tokens, and the attention scores of the smallest prefill chunk, do
                not fit into free memory.
        """
        token_nbytes = self._kv_token_nbytes(kv_bits, kv_group_size)
        scores = self.chunk_memory.scores_nbytes(fewest_tokens(tokens), tokens, kv_bits is not None)
        refuse_context(tokens, token_nbytes, scores)

    def plan_prefill(
        self,
        tokens: int,
        *,
        cached: int = 0,
        step_size: int | None = None,
        window: int | None = None,
        kv_bits: int | None = None,
        kv_group_size: int = 64,
    ) -> PrefillPlan:
        """Return the chunks of a prompt that fit into the memory that is free now.

        Args:
            tokens (int): Of the prompt.
            cached (int): Tokens at its beginning whose KV cache is in memory already. Default: ``0``.
            step_size (int, optional): Tokens of a chunk that the user asked for; they are fewer where the attention
                scores of a chunk would not fit. Default: ``None``, as many as memory allows.
            window (int, optional): Tokens that the KV cache keeps. Default: ``None``, all.
            kv_bits (int, optional): Of a quantized KV cache. Default: ``None``, it is not quantized.
            kv_group_size (int): Group size of a quantized KV cache. Default: ``64``.
        """
        kept = tokens - cached if window is None else max(0, min(tokens, window) - cached)
        # A layer's cache grows by a copy, one layer at a time.
        copied = (tokens if window is None else min(tokens, window)) / max(1, self.kv_layers)
        free = available_memory() - int((kept + copied) * self._kv_token_nbytes(kv_bits, kv_group_size))
        return PrefillPlan(
            tokens,
            self.chunk_memory,
            step_size or self.prefill_step_size,
            asked=step_size is not None,
            # A machine that is full already has room for a few scores.
            free=max(free, memory_reserve()),
            buffer=max_buffer_nbytes(),
            window=window,
            quantized=kv_bits is not None,
        )

    def _kv_token_nbytes(self, kv_bits: int | None, kv_group_size: int) -> float:
        if kv_bits is None:
            return self.kv_token_nbytes
        return self.kv_token_nbytes * quantized_share(kv_bits, kv_group_size, self.itemsize)

    def memory(self) -> str:
        """Return one line about memory, e.g. ``18.0 GB of 217.4 GB of experts in memory, 5.5 GB of trunk``."""
        slots, experts, trunk = (n / 1e9 for n in (self.slots_nbytes, self.experts_nbytes, self.trunk_nbytes))
        return f"{slots:.1f} GB of {experts:.1f} GB of experts in memory, {trunk:.1f} GB of trunk"

    def summary(self) -> str:
        """Return the ``Experts:`` line of the statistics."""
        all_resident = self.slots_nbytes == self.experts_nbytes
        line = f"Experts: {'all in memory' if all_resident else self.counters.summary()}"
        if given_back := sum((pool.planned - pool.slots) * pool.slot_nbytes for pool in self.pools):
            line += f", {given_back / 1e9:.2f} GB given back because memory ran short"
        if self.experts_per_token != self.native_experts_per_token:
            line += f", {self.experts_per_token} experts per token instead of {self.native_experts_per_token}"
        if not self.kernels:
            line += ", MLX operations alone"
        return line
