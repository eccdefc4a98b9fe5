"""Settings of a streamed model: one frozen dataclass, filled from TOML files, presets and flags."""

import argparse
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, Self

from flashmoe_mlx.system.package_data import data_dir
from flashmoe_mlx.system.text import read_text

SAMPLING = ("temp", "top_p", "top_k", "min_p")
"""Keys of ``Config.sampling``, named as mlx-lm's flags."""

SLOTS = ("live", "copied")
"""Values of ``Config.slots``."""

KEEP_WARM = ("auto", "on", "off")
"""Values of ``Config.keep_warm``."""

_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12}
_UNITS |= {"TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_LONGEST_TIMEOUT = 86400
"""Seconds. Python's clocks overflow at some larger number."""


@dataclass(frozen=True)
class Config:
    """Describe how the experts of a model are streamed.

    A field is a setting of the Python API, a TOML key and, if it has metadata, a command-line flag: the metadata are
    the options of ``ArgumentParser.add_argument``.

    Args:
        ram_budget (int or "auto"): Bytes for cached experts. ``0`` keeps a small shared pool on top of the OS page
            cache, ``"auto"`` takes what the machine can spare. Accepts text such as ``"12GB"``. Default: ``0``.
        experts_per_token (int, optional): Routed experts per token. Fewer than the model was trained with read less
            and change the output. Default: ``None``, the checkpoint's own number.
        read_threads (int): Reads in flight at once. Copies from the page cache use at most one thread per core.
            Default: ``16``.
        read_timeout (float): Seconds without progress after which a read fails. Default: ``60``.
        lookahead (bool): Prefetch the experts that the next layer's router would choose now. Default: ``False``.
        kernels (bool): Use this package's kernels. ``False`` runs MLX operations alone, for comparisons and bug
            reports. Default: ``True``.
        slots (str): ``"live"`` reads experts straight into the memory that kernels compute with. ``"copied"`` reads
            them into buffers and copies them from there, as an NVIDIA GPU always needs it. Does not change the output.
            Default: ``"live"``.
        keep_warm (str): Keep the clock of a Metal GPU up while it waits for the disk. ``"auto"`` does so unless the
            machine runs on its battery. Does not change the output. Default: ``"auto"``.
        warm_start (str, optional): File with the experts to start with; see ``Streaming.save_residents``.
            Default: ``None``.
        manifest (str, optional): File that ``flashmoe verify --write-manifest`` wrote. Each streamed expert is
            compared with it when it is first read. Default: ``None``.
        sampling (Mapping[str, float]): Defaults of the sampling flags ``temp``, ``top_p``, ``top_k`` and ``min_p``.
            The Python API leaves sampling to mlx-lm. Default: ``{}``.

    Raises:
        ValueError: A value is out of range, or a sampling key is unknown.
    """

    ram_budget: int | Literal["auto"] = field(
        default=0,
        metadata={
            "metavar": "SIZE",
            "help": "Memory for cached experts, e.g. 12GB, or auto for what the machine can spare. Does not change the "
            "output (on a GPU: up to rounding in long prompts). Default: %(default)s, a small shared pool on top of "
            "the OS page cache",
        },
    )
    experts_per_token: int | None = field(
        default=None,
        metadata={
            "type": int,
            "metavar": "K",
            "help": "Routed experts per token. Fewer are faster and change the output (default: the model's own "
            "number)",
        },
    )
    read_threads: int = field(
        default=16, metadata={"type": int, "metavar": "N", "help": "Reads in flight at once (default: %(default)s)"}
    )
    read_timeout: float = field(
        default=60,
        metadata={
            "type": float,
            "metavar": "SECONDS",
            "help": "Fail if a read makes no progress for this many seconds (default: %(default)s)",
        },
    )
    lookahead: bool = field(
        default=False,
        metadata={
            "action": "store_true",
            "help": "Prefetch the experts that the next layer's router would choose now, while this layer computes. "
            "Does not change the output",
        },
    )
    slots: Literal["live", "copied"] = field(
        default="live",
        metadata={
            "choices": SLOTS,
            "help": "Read experts straight into the memory that kernels compute with, or into buffers from which they "
            "are copied, as on an NVIDIA GPU in any case. Does not change the output (default: %(default)s)",
        },
    )
    keep_warm: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata={
            "choices": KEEP_WARM,
            "help": "Keep the clock of an Apple GPU up while it waits for the disk. auto does so unless the machine "
            "runs on its battery. Does not change the output (default: %(default)s)",
        },
    )
    kernels: bool = field(
        default=True,
        metadata={
            "action": argparse.BooleanOptionalAction,
            "help": "Use this package's kernels, or MLX operations alone, for comparisons and bug reports (default: "
            "--kernels)",
        },
    )
    warm_start: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Start with the experts that the last run with this file ended with, and write it again at the end",
        },
    )
    manifest: str | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "Compare each streamed expert, when it is first read, with this file of flashmoe verify "
            "--write-manifest",
        },
    )
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ram_budget != "auto":
            object.__setattr__(self, "ram_budget", parse_size(self.ram_budget))
        if self.experts_per_token is not None:
            check_integer("experts_per_token", self.experts_per_token)
        check_integer("read_threads", self.read_threads)
        if not _is_number(self.read_timeout) or not 0 < self.read_timeout <= _LONGEST_TIMEOUT:
            raise ValueError(
                f"read_timeout is {self.read_timeout!r}: it must be a positive number of seconds, at most one day "
                f"({_LONGEST_TIMEOUT})"
            )
        for name in ("lookahead", "kernels"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be true or false")
        _check_choice("slots", self.slots, SLOTS)
        _check_choice("keep_warm", self.keep_warm, KEEP_WARM)
        for name in ("warm_start", "manifest"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be the path of a file")
        if not isinstance(self.sampling, Mapping):
            raise ValueError(f"sampling is {self.sampling!r}: it must be a table, e.g. {{ temp = 0.6 }}")
        _refuse_unknown("sampling", self.sampling, SAMPLING)
        for name, value in self.sampling.items():
            if not _is_number(value):
                raise ValueError(f"sampling: {name} is {value!r}: it must be a number")

    @classmethod
    def flags(cls) -> tuple[Field[Any], ...]:
        """Return the fields that are command-line flags."""
        return tuple(setting for setting in fields(cls) if setting.metadata)

    @classmethod
    def load(cls, source: str | Path, model_type: str) -> Self:
        """Read settings from a TOML file, or from a preset of the model's family.

        Args:
            source (str or Path): File that ends in ``.toml``, or name of a table in ``configs/<model_type>.toml``.
            model_type (str): Family of the model, from its config.json.

        Raises:
            FileNotFoundError: The file does not exist.
            ValueError: The file is not TOML, or a preset, key or value is invalid.
        """
        if str(source).endswith(".toml"):
            return cls._from_table(str(source), _read_toml(Path(source).expanduser()))
        presets = data_dir("configs") / f"{model_type}.toml"
        if not presets.is_file():
            raise ValueError(f"no preset {source!r}: there are none for {model_type}. Give a .toml file instead")
        tables = _read_toml(presets)
        if source not in tables:
            raise ValueError(f"unknown preset {source!r} for {model_type}: choose from {', '.join(tables)}")
        return cls._from_table(f"{presets.name} [{source}]", tables[str(source)])

    @classmethod
    def _from_table(cls, origin: str, table: Mapping[str, Any]) -> Self:
        _refuse_unknown(origin, table, [setting.name for setting in fields(cls)])
        return cls(**table)

    def override(self, **settings: Any) -> Self:
        """Return a copy with those of the given settings that are not ``None``."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


def check_integer(name: str, value: object, minimum: Literal[0, 1] = 1) -> None:
    """Refuse a setting that is not a positive integer, or not a non-negative one if ``minimum`` is 0.

    Args:
        name (str): Name of the setting, for the message.
        value (object): Value to check.
        minimum (int): Smallest allowed value, 0 or 1. Default: ``1``.

    Raises:
        ValueError: The value is not such an integer.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        wanted = "a positive integer" if minimum else "a non-negative integer"
        raise ValueError(f"{name} is {value!r}: it must be {wanted}")


def parse_size(size: int | str) -> int:
    """Return the number of bytes in a size such as ``12GB``, ``11.5 GiB`` or ``0``.

    Raises:
        ValueError: The text is not a size, or the size is negative.
    """
    text = str(size).strip()
    digits = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    try:
        nbytes = int(Decimal(digits) * _UNITS[text[len(digits) :].strip().upper()])
    except (InvalidOperation, KeyError, ValueError, OverflowError) as error:
        raise ValueError(f"not a size: {size!r}. Write bytes or a unit, e.g. 12GB, or auto") from error
    if nbytes < 0:
        raise ValueError(f"a size cannot be negative: {size!r}")
    return nbytes


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be {', '.join(choices[:-1])} or {choices[-1]}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such config file: {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _refuse_unknown(origin: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := set(table) - set(known):
        raise ValueError(f"{origin}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
