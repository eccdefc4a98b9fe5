"""What all commands share: mlx-lm's parsers with our flags, our load() for mlx-lm's, and errors that are one line."""

import argparse
import sys
from collections.abc import Sequence

from flashmoe_mlx.checkpoint.folder import find_folder, read_config
from flashmoe_mlx.config import Config
from flashmoe_mlx.system.package_data import data_dir


def add_streaming_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group of flags that every command of ours has."""
    group = parser.add_argument_group("expert streaming")
    group.add_argument(
        "--ram-budget",
        metavar="SIZE",
        help="Memory for experts, e.g. 12GB, or auto for what the machine can spare. The output does not depend on it "
        "(default: 0, a small pool on top of the OS page cache)",
    )
    group.add_argument(
        "--experts-per-token",
        type=int,
        metavar="K",
        help="Routed experts a token uses. Fewer are faster and change the output (default: the model's own number)",
    )
    group.add_argument(
        "--read-threads",
        type=int,
        metavar="N",
        help="Reads under way at once (default: 16)",
    )
    group.add_argument(
        "--read-timeout",
        type=float,
        metavar="SECONDS",
        help="How long a read may bring nothing before the run ends with an error (default: 60)",
    )
    group.add_argument(
        "--lookahead",
        action="store_true",
        default=None,
        help="Read what the next layer's router would choose now while this layer computes. The output is the same",
    )
    group.add_argument(
        "--warm-start",
        metavar="FILE",
        help="Begin with the experts in memory that the last run with this file ended with",
    )
    group.add_argument(
        "--manifest",
        metavar="FILE",
        help="Compare each streamed expert, when it is read for the first time, with what flashmoe_mlx.verify wrote to "
        "this file",
    )
    group.add_argument(
        "--config",
        metavar="NAME",
        help="A preset of the model's family, 'exact' or 'flash', or a .toml file. It sets the sampling flags too; "
        "flags given here win",
    )
    group.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="Prompt tokens to process at a time. More read the experts fewer times and need more memory "
        "(default: what a quarter of the free memory holds, from 512 to 8192)",
    )


def extend_parser(stock: argparse.ArgumentParser, description: str, epilog: str) -> argparse.ArgumentParser:
    """One of mlx-lm's parsers with our flags, our words about it, and the demo model as the default."""
    parser = argparse.ArgumentParser(
        parents=[stock],
        conflict_handler="resolve",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", help="The path of a model folder, or a Hugging Face repo (default: the small demo model)"
    )
    add_streaming_arguments(parser)
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """The command line, and the settings that it chooses.

    Args:
        parser: from :func:`extend_parser`. It gets a preset's sampling as defaults.
        argv: the command line without the program's name, or ``None`` for ``sys.argv[1:]``.

    Raises:
        FileNotFoundError: the model's folder or the config file is missing.
        ValueError: an unknown or impossible setting.
        OSError: the model's repository could not be downloaded.
    """
    args = parser.parse_args(argv)
    if args.model is None:
        parser.set_defaults(model=str(data_dir("demo/model")))
        args = parser.parse_args(argv)
        print("no --model given: this is the demo model, a pocket dictionary that calls tools", file=sys.stderr)
    if args.prefill_step_size is not None and args.prefill_step_size < 1:
        raise ValueError(f"prefill_step_size is {args.prefill_step_size}: it must be a whole number from 1 on")
    config = Config()
    if args.config is not None:
        config = Config.load(args.config, read_config(find_folder(args.model))["model_type"])
        parser.set_defaults(**config.sampling)
        args = parser.parse_args(argv)
    own = ("ram_budget", "experts_per_token", "read_threads", "read_timeout", "lookahead", "warm_start", "manifest")
    return args, config.override(**{name: getattr(args, name) for name in own})
