"""Chunks of a prompt: their memory, and as many tokens as it allows."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Self

import mlx.core as mx

from flashmoe_mlx.checkpoint.folder import language_config
from flashmoe_mlx.system.metal import computes_on_metal, has_neural_accelerators

# Fewest and most tokens of a chunk, and fewest where the scores of more do not fit.
_CHUNKS = (512, 8192)
_FEWEST = 64

# Head widths that MLX's fused attention takes on Metal, for chunks of any size.
_FUSED_WIDTHS = (64, 80, 96, 128)
# On M5 and later, MLX also fuses heads of 256 for at least this many queries.
_FUSED_QUERIES = 1024


@dataclass(frozen=True)
class ChunkMemory:
    """Memory of a prefill chunk besides the KV cache, in the layer that needs most.

    Args:
        token_nbytes (int): Bytes of activations per token, without attention scores.
        heads (int): Query heads, each with a score for every token and every token before it.
        itemsize (int): Bytes of a score.
        copies (int): Arrays of scores at a time. Default: 1, because softmax takes the memory of its input.
        fused_tokens (int, optional): Chunks of at least this many tokens attend in a fused kernel, which keeps no
            scores. Default: ``None``, none do.
    """

    token_nbytes: int
    heads: int
    itemsize: int
    copies: int = 1
    fused_tokens: int | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, top_k: int, hidden: int, intermediate: int, itemsize: int, sinks: bool
    ) -> Self:
        """Return the memory of a model's chunks.

        The bytes of a token are an upper bound, those of

        - ``top_k * (4 * hidden + 3 * intermediate)`` values for the routed experts, sorted by expert: inputs, gate, up,
          activation and outputs, and the outputs again in the order of waves, of tokens, and weighted;
        - ``16 * hidden`` for the trunk: residual stream, norms, projections, shared expert;
        - except on Metal, one GatedDeltaNet state, because mlx-lm then keeps that of every token of a chunk.

        Args:
            config (Mapping): config.json.
            top_k (int): Experts per token.
            hidden (int): Width of the model.
            intermediate (int): Width of an expert.
            itemsize (int): Bytes of an activation.
            sinks (bool): Attention has sinks. Where it is not fused, MLX copies the scores to join them, and again to
                split them off, and more than three such arrays were measured.
        """
        config = language_config(config)
        heads = config.get("num_attention_heads") or hidden // 64
        values = top_k * (4 * hidden + 3 * intermediate) + 16 * hidden
        if not computes_on_metal():
            state = [config.get(f"linear_{name}", 0) for name in ("num_value_heads", "key_head_dim", "value_head_dim")]
            values += prod(state)
        width = config.get("head_dim") or hidden // heads
        return cls(values * itemsize, heads, itemsize, 4 if sinks else 1, _fused_tokens(config, width))

    def scores_nbytes(self, tokens: int, context: int, quantized: bool = False) -> int:
        """Return the bytes of attention scores, or 0 if a fused kernel keeps none.

        Args:
            tokens (int): Of the chunk.
            context (int): Tokens that the last one of the chunk attends to.
            quantized (bool): The KV cache is quantized, for which mlx-lm has no fused attention.
        """
        fused = self.fused_tokens is not None and tokens >= self.fused_tokens and not quantized
        return 0 if fused else self.copies * self.heads * tokens * context * self.itemsize

    def nbytes(self, tokens: int, context: int, quantized: bool = False) -> int:
        """Return the bytes of a chunk: activations and scores. The arguments are those of :meth:`scores_nbytes`."""
        return tokens * self.token_nbytes + self.scores_nbytes(tokens, context, quantized)

    def most_tokens(self, free_nbytes: int) -> int:
        """Return the tokens of the first chunk of a long prompt: a power of two from 512 to 8192.

        Each chunk reads the experts it needs once, so larger chunks read less in total. A chunk may take a quarter of
        the free memory; the rest is for the KV cache and the OS page cache.

        Args:
            free_nbytes (int): Bytes that trunk and slots leave.
        """
        fewest, tokens = _CHUNKS
        while tokens > fewest and self.nbytes(tokens, tokens) > free_nbytes // 4:
            tokens //= 2
        return tokens


@dataclass(frozen=True)
class PrefillPlan:
    """The chunks of one prompt. They become smaller as the context grows, where attention keeps its scores.

    Args:
        tokens (int): Of the prompt.
        memory (ChunkMemory): Of the model's chunks.
        most (int): Tokens that no chunk exceeds.
        asked (bool): The user asked for chunks of ``most`` tokens.
        free (int): Bytes that the KV cache of the whole prompt leaves.
        buffer (int): Bytes that one array may have.
        window (int, optional): Tokens of the KV cache. Default: ``None``, all.
        quantized (bool): The KV cache is quantized.
    """

    tokens: int
    memory: ChunkMemory
    most: int
    asked: bool
    free: int
    buffer: int
    window: int | None = None
    quantized: bool = False

    @property
    def step_size(self) -> int:
        """Tokens of a chunk that fits anywhere in the prompt, for a ``prefill_step_size`` of mlx-lm."""
        return self.chunk(self.tokens)

    def chunk(self, start: int) -> int:
        """Return the tokens of the chunk that begins after ``start`` tokens of the prompt.

        A chunk may take a quarter of the free memory, or half of it if it has been asked for or has no more than 512
        tokens. It is never below 64 tokens, or what was asked for.
        """
        tokens = self.most
        while tokens > _FEWEST and not self._fits(tokens, start):
            tokens //= 2
        return tokens

    def _fits(self, tokens: int, start: int) -> bool:
        context = self.context(tokens, start)
        scores = self.memory.scores_nbytes(tokens, context, self.quantized)
        if scores > self.buffer:
            return False
        # Activations alone have limited the largest chunk already.
        if self.asked or tokens <= _CHUNKS[0]:
            return scores <= self.free // 2
        return self.memory.nbytes(tokens, context, self.quantized) <= self.free // 4

    def context(self, tokens: int, start: int) -> int:
        """Return how many tokens a chunk of ``tokens`` attends to that begins after ``start`` tokens."""
        return tokens + (start if self.window is None else min(start, self.window))


def fewest_tokens(tokens: int) -> int:
    """Return the tokens of the smallest chunk of a prompt of ``tokens`` tokens."""
    return min(tokens, _FEWEST)


def _fused_tokens(config: Mapping[str, Any], width: int) -> int | None:
    """Return the fewest tokens that attend in a fused kernel, or ``None`` if there is no kernel."""
    # Keys and values of compressed attention have different widths.
    if mx.default_device().type == mx.cpu or config.get("kv_lora_rank"):
        return None
    if not computes_on_metal():
        return 0 if width <= 128 else None
    if width in _FUSED_WIDTHS:
        return 0
    return _FUSED_QUERIES if width == 256 and has_neural_accelerators() else None
