"""Settings: what a command line, a preset and a TOML file choose, and which of them wins."""

import argparse
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.config import SAMPLING, Config, check_integer
from tests.conftest import WriteFamily
from tests.support.flags import STREAMING, flags

EVERYTHING = {
    "ram_budget": ("12GB", 12 * 10**9),
    "experts_per_token": ("3", 3),
    "read_threads": ("4", 4),
    "read_timeout": ("1.5", 1.5),
    "slots": ("copied", "copied"),
    "keep_warm": ("off", "off"),
    "warm_start": ("warm.json", "warm.json"),
    "manifest": ("manifest.json", "manifest.json"),
}
"""A value of each setting on the command line, and in Python."""


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    """Return a parser as a command makes it, with sampling flags before and after it is extended."""
    stock = argparse.ArgumentParser(add_help=False)
    stock.add_argument("--temp", type=float, default=0.25)
    stock.add_argument("--top-p", type=float, default=1.0)
    parser = extend_parser(stock, "A command.", "")
    parser.add_argument("--top-k", type=int, default=0, help="(default: %(default)s)")
    return parser


@pytest.fixture
def model(checkpoint: WriteFamily) -> str:
    return str(checkpoint("qwen3_5_moe"))


def test_every_setting_is_a_flag(parser: argparse.ArgumentParser) -> None:
    settings = {f"--{setting.name.replace('_', '-')}" for setting in fields(Config)} - {"--sampling"}
    assert settings | {"--config", "--no-kernels"} == STREAMING
    assert flags(parser) >= STREAMING


def test_every_setting_can_be_given_as_a_flag(parser: argparse.ArgumentParser, model: str) -> None:
    argv = [part for name, (text, _) in EVERYTHING.items() for part in (f"--{name.replace('_', '-')}", text)]
    _, config = parse_arguments(parser, ["--model", model, "--lookahead", "--no-kernels", *argv])
    assert config == Config(lookahead=True, kernels=False, **{name: value for name, (_, value) in EVERYTHING.items()})


def test_every_setting_can_be_given_in_a_toml_file(parser: argparse.ArgumentParser, model: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    lines = [f"{name} = {value!r}" for name, (_, value) in EVERYTHING.items()]
    file.write_text("\n".join([*lines, "lookahead = true", "kernels = false", "sampling = { min_p = 0.5 }"]))
    args, config = parse_arguments(parser, ["--model", model, "--config", str(file)])
    values: dict[str, Any] = {name: value for name, (_, value) in EVERYTHING.items()}
    assert config == Config(lookahead=True, kernels=False, sampling={"min_p": 0.5}, **values)
    assert args.min_p == 0.5


def test_without_flags_there_are_defaults(parser: argparse.ArgumentParser, model: str) -> None:
    args, config = parse_arguments(parser, ["--model", model])
    assert config == Config()
    assert (args.temp, args.top_p, args.top_k) == (0.25, 1.0, 0)


def test_flags_win_over_a_file_and_a_file_over_defaults(
    parser: argparse.ArgumentParser, model: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("read_threads = 4\nread_timeout = 3\nkernels = false\nsampling = { temp = 0.6, top_k = 20 }\n")
    argv = ["--model", model, "--config", str(file), "--read-threads", "16", "--temp", "0.25", "--kernels"]
    args, config = parse_arguments(parser, argv)
    # Both are given, although they are the defaults.
    assert (config.read_threads, args.temp, config.kernels) == (16, 0.25, True)
    assert (config.read_timeout, args.top_k) == (3, 20)
    assert args.top_p == 1.0


def test_the_command_line_is_parsed_once(
    parser: argparse.ArgumentParser, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parse, lines = parser.parse_known_args, []

    def record(argv: Any, namespace: Any) -> Any:
        lines.append(argv)
        return parse(argv, namespace)

    monkeypatch.setattr(parser, "parse_known_args", record)
    argv = ["--model", model, "--config", "exact"]
    parse_arguments(parser, argv)
    assert lines == [argv]


def test_help_names_the_defaults(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    assert "Reads in flight at once (default: 16)" in text
    assert "(default: --kernels)" in text
    assert "Default: 0, a small shared pool" in text
    assert "(default: 0)" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"read_threads": 0}, "read_threads is 0: it must be a positive integer"),
        ({"read_threads": True}, "read_threads is True: it must be a positive integer"),
        ({"read_threads": 1.0}, "read_threads is 1.0: it must be a positive integer"),
        ({"experts_per_token": -1}, "experts_per_token is -1: it must be a positive integer"),
        ({"read_timeout": 0}, "read_timeout is 0: it must be a positive number of seconds"),
        ({"read_timeout": float("nan")}, "read_timeout is nan"),
        ({"read_timeout": float("inf")}, "at most one day"),
        ({"read_timeout": "1"}, "read_timeout is '1'"),
        ({"lookahead": 1}, "lookahead is 1: it must be true or false"),
        ({"slots": "dead"}, "slots is 'dead': it must be live or copied"),
        ({"keep_warm": True}, "keep_warm is True: it must be auto, on or off"),
        ({"kernels": "no"}, "kernels is 'no': it must be true or false"),
        ({"warm_start": 3}, "warm_start is 3: it must be the path of a file"),
        ({"ram_budget": "12 parsecs"}, "not a size: '12 parsecs'"),
        ({"ram_budget": "-1GB"}, "a size cannot be negative"),
        ({"sampling": 0.6}, "sampling is 0.6: it must be a table"),
        ({"sampling": {"temp": "hot"}}, "sampling: temp is 'hot': it must be a number"),
        ({"sampling": {"temperature": 0.6}}, "sampling: unknown temperature; known are min_p, temp, top_k, top_p"),
    ],
)
def test_an_impossible_setting_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [("experts = 3", "unknown experts; known are"), ("experts_per_token = ", "is not TOML"), ("\xff", "is not TOML")],
)
def test_a_damaged_or_unknown_toml_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=words):
        Config.load(file, "qwen3_5_moe")


def test_a_family_without_presets_is_told_to_give_a_file() -> None:
    with pytest.raises(ValueError, match="no preset 'exact': there are none for gpt_oss"):
        Config.load("exact", "gpt_oss")


def test_a_preset_may_set_each_sampling_flag_of_mlx_lm() -> None:
    from mlx_lm.generate import setup_arg_parser

    assert {f"--{name.replace('_', '-')}" for name in SAMPLING} <= flags(setup_arg_parser())


def test_integers_are_checked_in_one_way() -> None:
    check_integer("count", 1)
    check_integer("count", 0, minimum=0)
    with pytest.raises(ValueError, match=r"^count is 0: it must be a positive integer$"):
        check_integer("count", 0)
    with pytest.raises(ValueError, match=r"^count is -1: it must be a non-negative integer$"):
        check_integer("count", -1, minimum=0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--temp", "-1"], "--temp is -1.0: it must be from 0 to 1000"),
        (["--temp", "nan"], "--temp is nan: it must be from 0 to 1000"),
        (["--top-p", "2"], "--top-p is 2.0: it must be from 0 to 1"),
        (["--top-k", "-1"], "--top-k is -1: it must be from 0 to 2147483648"),
        (["--seed", "-1"], "--seed is -1: it must be from 0 to 18446744073709551615"),
        (["--seed", "18446744073709551616"], "--seed is 18446744073709551616: it must be from 0"),
        (["--max-kv-size", "0"], "--max-kv-size is 0: it must be from 1"),
    ],
)
def test_a_number_that_mlx_cannot_use_is_refused(
    argv: list[str], words: str, parser: argparse.ArgumentParser, model: str
) -> None:
    """Some of them would change the output silently."""
    for flag in ("--seed", "--max-kv-size"):
        parser.add_argument(flag, type=int)
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        parse_arguments(parser, ["--model", model, *argv])


def test_the_largest_seed_and_the_smallest_temperature_are_accepted(
    parser: argparse.ArgumentParser, model: str
) -> None:
    parser.add_argument("--seed", type=int)
    args, _ = parse_arguments(parser, ["--model", model, "--seed", str(2**64 - 1), "--temp", "0", "--top-k", "0"])
    mx.random.seed(args.seed)


@pytest.mark.parametrize(
    "text", ["read_threads = 3", "# nothing else\nread_threads = 3\n", "read_threads = 3 # \u20ac"]
)
def test_a_byte_order_mark_is_not_part_of_a_toml_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, encoding="utf-8-sig")
    assert Config.load(file, "qwen3_5_moe").read_threads == 3
