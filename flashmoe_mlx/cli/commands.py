"""The table of commands, and how one of them is started."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, NoReturn

from flashmoe_mlx.cli.interrupts import exit_on_interrupt
from flashmoe_mlx.cli.terminal import open_standard_streams


class Command(NamedTuple):
    """A command of ``flashmoe``.

    Args:
        name (str): Its name on the command line.
        module (str): Its module in this package, which has ``setup_arg_parser()`` and ``main(argv)``.
        summary (str): One line about it.
    """

    name: str
    module: str
    summary: str

    def run(self, prog: str, argv: Sequence[str] | None = None) -> NoReturn:
        """Run the command, and end the process.

        Args:
            prog (str): Name of the program in its help and usage.
            argv (Sequence[str], optional): Command line without that name. Default: ``sys.argv[1:]``.
        """
        open_standard_streams()
        # Importing MLX and mlx-lm takes a second.
        exit_on_interrupt()
        sys.argv[0] = prog
        import_module(f"flashmoe_mlx.{self.module}").main(argv)
        sys.exit()


COMMANDS = (
    Command("generate", "generate", "Generate text from a prompt"),
    Command("chat", "chat", "Talk with a model, with your Python functions as tools"),
    Command("serve", "server", "Serve a model through OpenAI's HTTP API"),
    Command("evaluate", "evaluate", "Measure what fewer experts or fewer bits cost"),
    Command("verify", "verify", "Check a model's files for damage"),
    Command("cache-prompt", "cache_prompt", "Process a prompt once, and save the state to a file"),
)


def run_module(file: str) -> NoReturn:
    """Run the command of a module that was started with ``python -m``, and end the process.

    A command's module calls this before its own imports. It is then imported a second time, as part of the package.

    Args:
        file (str): The module's ``__file__``.
    """
    module = Path(file).stem
    command = next(command for command in COMMANDS if command.module == module)
    command.run(f"python -m flashmoe_mlx.{module}")
