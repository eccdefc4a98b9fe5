"""Flags and settings that the commands share."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flashmoe_mlx.checkpoint.folder import find_folder, read_config
from flashmoe_mlx.config import SAMPLING, Config, check_integer
from flashmoe_mlx.system.package_data import data_dir
from flashmoe_mlx.system.text import check_text

# Lowest and highest value of numbers that mlx-lm takes as they are: some of them would change the output silently.
_RANGES = {
    "temp": (0, 1000),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "top_k": (0, 2**31),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
    "seed": (0, 2**64 - 1),
    "min_tokens_to_keep": (1, 2**31),
    "num_draft_tokens": (1, 2**31),
    "max_kv_size": (1, 2**63 - 1),
    "quantized_kv_start": (0, 2**63 - 1),
}


def command_parser(
    description: str, epilog: str, parents: Sequence[argparse.ArgumentParser] = ()
) -> argparse.ArgumentParser:
    """Return a parser in the style of all commands.

    Args:
        description (str): One sentence about the command.
        epilog (str): Examples, printed as they are.
        parents (Sequence[ArgumentParser]): Parsers whose flags it takes over, and may define again. Default: ``()``.
    """
    return argparse.ArgumentParser(
        # As Command.run() has set it. Python 3.14 would not use it on its own.
        prog=Path(sys.argv[0]).name,
        parents=parents,
        conflict_handler="resolve",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def extend_parser(stock: argparse.ArgumentParser, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return one of mlx-lm's parsers with the flags of expert streaming, and the demo model as the default.

    Args:
        stock (ArgumentParser): The parser to extend. It is not changed.
        description (str): One sentence about the command.
        epilog (str): Examples, printed as they are.
    """
    parser = command_parser(description, epilog, [stock])
    parser.add_argument(
        "--model", help="The path of a model folder, or a Hugging Face repo (default: the small demo model)"
    )
    add_streaming_arguments(parser)
    return parser


def add_streaming_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting of :class:`Config`, and those that need a model or a prompt."""
    group = parser.add_argument_group("expert streaming")
    for setting in Config.flags():
        group.add_argument(flag(setting.name), default=setting.default, **setting.metadata)
    group.add_argument(
        "--config",
        metavar="NAME",
        help="A preset of the model's family, exact or flash, or a .toml file. It also sets the sampling flags. Flags "
        "on the command line win",
    )
    group.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="Prompt tokens to process at a time. Larger chunks read each expert fewer times and need more memory "
        "(default: what fits in a quarter of the free memory, from 512 to 8192)",
    )


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Parse a command line, and complete it with the demo model, a preset and defaults.

    Args:
        parser (ArgumentParser): From :func:`extend_parser`.
        argv (Sequence[str], optional): Command line without the program's name. ``None`` takes ``sys.argv[1:]``.

    Returns:
        tuple: (args, config).

    Raises:
        FileNotFoundError: The model's folder or the config file does not exist.
        ValueError: A setting is unknown or out of range.
        OSError: The model's repository could not be downloaded.
    """
    args = parse(parser, argv)
    return args, complete(args, parser)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line. What a preset may set, and was not given, is ``None``."""
    # argparse fills in defaults only where the namespace has no attribute yet.
    settings = (*SAMPLING, *(setting.name for setting in Config.flags()))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings)))
    check_texts(args)
    return args


def check_texts(args: argparse.Namespace) -> None:
    """Refuse a flag whose value is no Unicode text.

    Raises:
        ValueError: There is one.
    """
    for name, value in vars(args).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                check_text(flag(name), text)


def _check_numbers(args: argparse.Namespace) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(args, name, None)
        # A comparison with NaN is false.
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag(name)} is {value}: it must be from {low} to {high}")


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def complete(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Config:
    """Fill in the model and the sampling flags that were not given, and return the settings of streaming.

    Args:
        args (Namespace): From :func:`parse`.
        parser (ArgumentParser): The same parser, for its defaults.

    Raises:
        FileNotFoundError: The model's folder or the config file does not exist.
        ValueError: A setting is unknown or out of range.
        OSError: The model's repository could not be downloaded.
    """
    if args.model is None:
        args.model = str(data_dir("demo/model"))
        print("no --model given: using the demo model, a pocket dictionary that calls tools", file=sys.stderr)
    if args.prefill_step_size is not None:
        check_integer("--prefill-step-size", args.prefill_step_size)
    config = Config()
    if args.config is not None:
        config = Config.load(args.config, read_config(find_folder(args.model))["model_type"])
    for name in SAMPLING:
        if getattr(args, name) is None:
            setattr(args, name, config.sampling.get(name, parser.get_default(name)))
    _check_numbers(args)
    return config.override(**{setting.name: getattr(args, setting.name) for setting in Config.flags()})
