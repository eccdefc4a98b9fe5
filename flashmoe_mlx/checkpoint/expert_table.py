"""Locates the experts of a layer in a checkpoint, in every layout that checkpoints store experts in."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from flashmoe_mlx.checkpoint.folder import Checkpoint, tail
from flashmoe_mlx.checkpoint.span import DTYPES, Span

# mlx-lm's names of an expert's projections, and those in Hugging Face checkpoints.
_ALIASES = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "fc1": ("fc1", "up_proj"),
    "fc2": ("fc2", "down_proj"),
}
# The halves of a fused gate_up_proj, in this order.
_HALVES = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class ExpertPart:
    """One parameter of an expert.

    Args:
        name (str): Its name in the switch layer, such as ``gate_proj.weight``.
        shape (tuple[int, ...]): Its shape for one expert.
        stored (mx.Dtype): The dtype in the checkpoint.
        computed (mx.Dtype): The dtype in memory: float32 where ``stored`` is half precision that must be widened, else
            the same.
    """

    name: str
    shape: tuple[int, ...]
    stored: mx.Dtype
    computed: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Return its bytes in memory."""
        return prod(self.shape) * self.computed.size


@dataclass(frozen=True)
class ExpertTable:
    """The experts of one layer: their parameters, and where each lies on disk.

    Args:
        layer (str): Path of the switch layer in the model.
        parts (tuple[ExpertPart, ...]): Parameters of an expert.
        spans (Sequence[tuple[Span, ...]]): For each expert, the span of each parameter.
    """

    layer: str
    parts: tuple[ExpertPart, ...]
    spans: Sequence[tuple[Span, ...]]

    @classmethod
    def build(
        cls,
        checkpoint: Checkpoint,
        layer: str,
        parameters: Mapping[str, mx.array],
        computed_dtype: Callable[[mx.Dtype, str], mx.Dtype],
    ) -> "ExpertTable":
        """Find the experts of a layer.

        Args:
            checkpoint (Checkpoint): The checkpoint to look in.
            layer (str): Path of the switch layer in the model, e.g. ``model.layers.3.mlp.switch_mlp``.
            parameters (Mapping[str, mx.array]): The layer's, by name, each ``[experts, ...]``. They are not evaluated.
            computed_dtype (Callable): Takes the stored dtype and the name of a parameter, and returns the dtype to keep
                it in.

        Raises:
            ValueError: A parameter is not on disk as one span per expert, in this shape and dtype.
        """
        parts = tuple(
            ExpertPart(name, array.shape[1:], array.dtype, computed_dtype(array.dtype, name))
            for name, array in parameters.items()
        )
        columns = (_spans(checkpoint, layer, name, array) for name, array in parameters.items())
        return cls(layer, parts, tuple(zip(*columns, strict=True)))

    @property
    def experts(self) -> int:
        """Return the number of experts."""
        return len(self.spans)

    @property
    def expert_nbytes(self) -> int:
        """Return the bytes of an expert on disk, which are the same for all experts of a layer."""
        return sum(span.nbytes for span in self.spans[0])

    @property
    def slot_nbytes(self) -> int:
        """Return the bytes of an expert in memory."""
        return sum(part.nbytes for part in self.parts)

    def reads(
        self, experts: Sequence[int], buffers: Sequence[Sequence[memoryview]]
    ) -> Iterator[tuple[Span, memoryview]]:
        """Yield the span and the buffer of every part of some experts.

        Part by part, because the same part of neighboring experts is contiguous on disk.

        Args:
            experts (Sequence[int]): Their numbers.
            buffers (Sequence[Sequence[memoryview]]): For each expert, one buffer for each part.
        """
        for part in range(len(self.parts)):
            for expert, parts in zip(experts, buffers, strict=True):
                yield self.spans[expert][part], parts[part]


def _spans(checkpoint: Checkpoint, layer: str, name: str, array: mx.array) -> list[Span]:
    """Return the span of each expert for one parameter of a layer."""
    experts, *shape = array.shape
    projection, _, kind = name.partition(".")
    parent, _, _ = tail(layer).rpartition(".")
    # Hugging Face's module of the experts.
    folder = parent if parent.endswith("experts") else f"{parent}.experts"

    stacked = [f"{layer}.{name}"] + ([f"{folder}.{projection}"] if kind == "weight" else [])
    for candidate in stacked:
        if found := checkpoint.find(candidate):
            _check(checkpoint, found, array.dtype, (experts, *shape))
            return [checkpoint.tensors[found].block(expert, experts) for expert in range(experts)]

    fused = checkpoint.find(f"{folder}.gate_up_proj")
    if fused and kind == "weight" and projection in _HALVES:
        _check(checkpoint, fused, array.dtype, (experts, 2 * shape[0], *shape[1:]))
        half = _HALVES.index(projection)
        return [checkpoint.tensors[fused].block(2 * expert + half, 2 * experts) for expert in range(experts)]

    for alias in _ALIASES.get(projection, ()):
        if checkpoint.find(f"{folder}.0.{alias}.{kind}"):
            spans = []
            for expert in range(experts):
                each = f"{folder}.{expert}.{alias}.{kind}"
                found = checkpoint.find(each) or each
                _check(checkpoint, found, array.dtype, tuple(shape))
                spans.append(checkpoint.tensors[found].span)
            return spans
    raise _cannot_stream(checkpoint, f"{layer}.{name} was not found under any known name")


def _check(checkpoint: Checkpoint, name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    """Refuse a tensor whose bytes are not the model's, because mlx-lm would transpose, dequantize or stack it."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise _cannot_stream(checkpoint, f"{name} is missing")
    if tensor.shape != shape or DTYPES.get(tensor.dtype) != dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        wanted = f"{str(dtype).removeprefix('mlx.core.')} {list(shape)}"
        raise _cannot_stream(checkpoint, f"{name} is {found} on disk, but the model needs {wanted}")


def _cannot_stream(checkpoint: Checkpoint, reason: str) -> ValueError:
    folder = checkpoint.folder
    return ValueError(
        f"the experts of {folder} cannot be read in place: {reason}. Convert the checkpoint once: "
        f"mlx_lm.convert --hf-path {folder} --mlx-path {folder.name}-mlx"
    )
