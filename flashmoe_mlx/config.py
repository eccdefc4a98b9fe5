"""Settings of a streamed model: one frozen dataclass, filled from TOML files and arguments."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, Self

from flashmoe_mlx.system.package_data import data_dir

_UNITS = {"": 1, "B": 1, "K": 10**3, "KB": 10**3, "M": 10**6, "MB": 10**6, "G": 10**9, "GB": 10**9, "T": 10**12}
_UNITS |= {"TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SAMPLING = {"temp", "top_p", "top_k", "min_p"}  # as mlx_lm.generate's flags are called


@dataclass(frozen=True)
class Config:
    """How a model's experts are streamed. Every field has the name of its TOML key and its command line flag.

    Args:
        ram_budget (int or "auto"): bytes for experts in memory. 0 keeps one small pool and trusts the OS page cache;
            ``"auto"`` takes what the machine can spare. Accepts text such as ``"12GB"``.
        experts_per_token (int, optional): routed experts a token uses. ``None`` is the checkpoint's own number, the
            one the model was trained with; fewer read less and change the output.
        read_threads (int): reads under way at once; copies from the page cache take no more than there are cores.
        read_timeout (float): seconds that a read may bring nothing before the request fails.
        lookahead (bool): read what the next layer's router would choose now, while this layer computes.
        warm_start (str, optional): a file with the experts to begin with; see ``Streaming.save_residents``.
        manifest (str, optional): a file that ``flashmoe_mlx.verify`` wrote; each streamed expert is compared with it
            when it is read for the first time.
        sampling (Mapping[str, float]): what the command line samples with unless told otherwise; keys ``temp``,
            ``top_p``, ``top_k``, ``min_p``. The Python API leaves sampling to mlx-lm.

    Raises:
        ValueError: a value is out of range or a sampling key unknown.
    """

    ram_budget: int | Literal["auto"] = 0
    experts_per_token: int | None = None
    read_threads: int = 16
    read_timeout: float = 60
    lookahead: bool = False
    warm_start: str | None = None
    manifest: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ram_budget != "auto":
            object.__setattr__(self, "ram_budget", parse_size(self.ram_budget))
        for name in ("experts_per_token", "read_threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}: it must be a whole number from 1 on")
        if not isinstance(self.read_timeout, int | float) or not self.read_timeout > 0:
            raise ValueError(f"read_timeout is {self.read_timeout!r}: it must be a number of seconds above 0")
        if not isinstance(self.lookahead, bool):
            raise ValueError(f"lookahead is {self.lookahead!r}: it must be true or false")
        for name in ("warm_start", "manifest"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is {getattr(self, name)!r}: it must be the path of a file")
        if not isinstance(self.sampling, Mapping):
            raise ValueError(f"sampling is {self.sampling!r}: it must be a table, e.g. {{ temp = 0.6 }}")
        _refuse_unknown("sampling", self.sampling, _SAMPLING)

    @classmethod
    def load(cls, source: str | Path, model_type: str) -> Self:
        """Read settings from a TOML file, or from a preset of the model's family.

        Args:
            source (str or Path): a file that ends in ``.toml``, or a table of ``configs/<model_type>.toml``.
            model_type (str): the checkpoint's, from its config.json.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not TOML, or a preset or key is unknown.
        """
        if str(source).endswith(".toml"):
            return cls._from_table(str(source), _read_toml(Path(source)))
        presets = data_dir("configs") / f"{model_type}.toml"
        if not presets.is_file():
            raise ValueError(f"no presets for {model_type}, so no {source!r}: give a .toml file instead")
        tables = _read_toml(presets)
        if source not in tables:
            raise ValueError(f"unknown preset {source!r} for {model_type}: choose from {', '.join(tables)}")
        return cls._from_table(f"{presets.name} [{source}]", tables[str(source)])

    @classmethod
    def _from_table(cls, origin: str, table: Mapping[str, Any]) -> Self:
        _refuse_unknown(origin, table, {f.name for f in fields(cls)})
        return cls(**table)

    def override(self, **settings: Any) -> Self:
        """A copy with those settings that are not ``None``."""
        return replace(self, **{name: value for name, value in settings.items() if value is not None})


def parse_size(size: int | str) -> int:
    """Read a number of bytes, e.g. ``12GB``, ``11.5 GiB`` or ``0``.

    Raises:
        ValueError: it is not a size, or negative.
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


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no such config file: {path}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def _refuse_unknown(origin: str, table: Mapping[str, Any], known: set[str]) -> None:
    if unknown := set(table) - known:
        raise ValueError(f"{origin}: unknown {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}")
