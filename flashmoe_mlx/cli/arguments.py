"""What all commands share: mlx-lm's parsers with our flags, our load() for mlx-lm's, and errors that are one line."""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx_lm

from flashmoe_mlx.checkpoint.folder import find_folder, read_config
from flashmoe_mlx.cli.interrupts import leave
from flashmoe_mlx.config import Config, data_dir
from flashmoe_mlx.model.load import Streaming, load

_HEARING = 0.7  # seconds that the main thread has for an interrupt


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


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1, Ctrl-C into 130, and a closed pipe into silence."""
    try:
        with _prompt_interrupts():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read us has gone; Python would complain once more while it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        with suppress(BrokenPipeError):
            sys.stdout.flush()
        if signal.getsignal(signal.SIGINT) is leave:
            leave()
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # MLX's own are RuntimeErrors
        reason = str(error)
        if isinstance(error, OSError) and error.filename is not None:  # the system's own, which begins "[Errno 2]"
            reason = f"{error.filename}: {error.strerror}"
        print(f"error: {' '.join(reason.split())}", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _prompt_interrupts() -> Iterator[None]:
    """Let Ctrl-C end the process within a second, even if the main thread is inside MLX and does not hear it."""
    if threading.current_thread() is not threading.main_thread():  # whose signals these are
        yield
        return
    over = threading.Event()
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def listen() -> None:
        while number := os.read(ear, 1):
            if number[0] == signal.SIGINT and not over.wait(_HEARING):
                with suppress(OSError, ValueError):
                    sys.stdout.flush()
                leave()
        os.close(ear)

    def report(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:  # Python drops one that meets a finalizer, listen() does not
            report_before(unraisable)

    threading.Thread(target=listen, name="interrupts", daemon=True).start()
    ear_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    report_before, sys.unraisablehook = sys.unraisablehook, report
    handler = signal.getsignal(signal.SIGINT)
    try:
        if handler is leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    finally:
        if handler is leave:
            signal.signal(signal.SIGINT, leave)
        over.set()
        sys.unraisablehook = report_before
        signal.set_wakeup_fd(ear_before)
        os.close(mouth)


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


def streamed_load(args: argparse.Namespace, config: Config) -> Callable[..., tuple[Any, ...]]:
    """What takes the place of ``load`` in one of mlx-lm's commands: ours, except for a draft model."""

    def load_streamed(path: str, **options: Any) -> tuple[Any, ...]:
        if path == getattr(args, "draft_model", None):
            return tuple(mlx_lm.load(path, **options))  # small, and rarely a Mixture of Experts
        loaded = load(path, config=config, **options)
        if config.ram_budget == "auto":
            print(f"ram budget auto: {loaded[0].streaming.memory()}", file=sys.stderr)
        return loaded

    return load_streamed


def finish(streaming: Streaming, config: Config, verbose: bool = True) -> None:
    """What every run ends with: the ``Experts:`` line unless it is to be silent, and the file for the next warm start.

    Raises:
        OSError: that file cannot be written.
    """
    if verbose:
        print(streaming.summary())
    if config.warm_start is not None:
        streaming.save_residents(config.warm_start)
