"""Which spans hold expert e of a layer, in every way that checkpoints store experts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from flashmoe_mlx.checkpoint.folder import Checkpoint, tail
from flashmoe_mlx.checkpoint.span import DTYPES, Span

# What Hugging Face checkpoints call an expert's projections: like mlx-lm, or w1/w2/w3, or two of three in an MLP.
_ALIASES = {
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3"),
    "down_proj": ("down_proj", "w2"),
    "fc1": ("fc1", "up_proj"),
    "fc2": ("fc2", "down_proj"),
}
_HALVES = ("gate_proj", "up_proj")  # of a fused gate_up_proj, in this order


@dataclass(frozen=True)
class ExpertPart:
    """One parameter of an expert, such as ``gate_proj.weight``: its ``shape``, and its ``dtype`` as stored."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


@dataclass(frozen=True)
class ExpertTable:
    """Where the experts of one layer lie on disk.

    Args:
        layer (str): the switch layer's path in the model.
        parts (tuple[ExpertPart, ...]): what an expert is made of.
        spans (Sequence[tuple[Span, ...]]): for each expert, the spans of its parts.
    """

    layer: str
    parts: tuple[ExpertPart, ...]
    spans: Sequence[tuple[Span, ...]]

    @classmethod
    def build(cls, checkpoint: Checkpoint, layer: str, parameters: Mapping[str, mx.array]) -> "ExpertTable":
        """Find the experts of a layer.

        Args:
            checkpoint (Checkpoint): where to look.
            layer (str): the switch layer's path in the model, e.g. ``model.layers.3.mlp.switch_mlp``.
            parameters (Mapping[str, mx.array]): the layer's, by name, each ``[experts, ...]``; never evaluated.

        Raises:
            ValueError: a parameter is not on disk as one span per expert, in this shape and dtype.
        """
        parts = tuple(ExpertPart(name, array.shape[1:], array.dtype) for name, array in parameters.items())
        columns = (_spans(checkpoint, layer, name, array) for name, array in parameters.items())
        return cls(layer, parts, tuple(zip(*columns, strict=True)))

    @property
    def experts(self) -> int:
        """How many there are."""
        return len(self.spans)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of an expert on disk; all of a layer have as many."""
        return sum(span.nbytes for span in self.spans[0])

    def reads(
        self, experts: Sequence[int], buffers: Sequence[Sequence[memoryview]]
    ) -> Iterator[tuple[Span, memoryview]]:
        """Each part of each expert and where it goes; part by part, because those of neighbours follow one another.

        Args:
            experts (Sequence[int]): their numbers.
            buffers (Sequence[Sequence[memoryview]]): for each of them, one for each part.
        """
        for part in range(len(self.parts)):
            for expert, parts in zip(experts, buffers, strict=True):
                yield self.spans[expert][part], parts[part]


def _spans(checkpoint: Checkpoint, layer: str, name: str, array: mx.array) -> list[Span]:
    """The span of each expert for one parameter of a layer."""
    experts, *shape = array.shape
    projection, _, kind = name.partition(".")
    parent, _, _ = tail(layer).rpartition(".")
    folder = parent if parent.endswith("experts") else f"{parent}.experts"  # Hugging Face's module

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
    raise _cannot_stream(checkpoint, f"{layer}.{name} is not there under any name that is known")


def _check(checkpoint: Checkpoint, name: str, dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    """The bytes on disk must be what the model computes with: no transposing, no dequantising, no stacking."""
    tensor = checkpoint.tensors.get(name)
    if tensor is None:
        raise _cannot_stream(checkpoint, f"{name} is missing")
    if tensor.shape != shape or DTYPES.get(tensor.dtype) != dtype:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        wanted = f"{str(dtype).removeprefix('mlx.core.')} {list(shape)}"
        raise _cannot_stream(checkpoint, f"{name} is {found} on disk, and the model computes with {wanted}")


def _cannot_stream(checkpoint: Checkpoint, reason: str) -> ValueError:
    folder = checkpoint.folder
    return ValueError(
        f"the experts of {folder} cannot be read in place: {reason}. Convert the checkpoint once: "
        f"mlx_lm.convert --hf-path {folder} --mlx-path {folder.name}-mlx"
    )
