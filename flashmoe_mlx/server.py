"""Serve a model with streamed experts by OpenAI's API, on this machine only unless there is a key.

python -m flashmoe_mlx.server --model FOLDER_OR_REPO --ram-budget 12GB
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
import ipaddress
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.nn as nn

from flashmoe_mlx.checkpoint.folder import find_folder
from flashmoe_mlx.checkpoint.identity import model_identity
from flashmoe_mlx.cli.arguments import extend_parser, parse_arguments
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.run import finish, streamed_load
from flashmoe_mlx.config import parse_size
from flashmoe_mlx.generation.prefix_store import Prefixes
from flashmoe_mlx.generation.prompt_cache import cache_settings
from flashmoe_mlx.generation.worker import Generations
from flashmoe_mlx.serving.http import Server
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.service import Limits, Service

EPILOG = """examples:
  python -m flashmoe_mlx.server --model mlx-community/Qwen3.5-397B-A17B-4bit --ram-budget 20GB
  curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is a heron?"}]}'
  python -m flashmoe_mlx.server --host 0.0.0.0 --api-key-file key.txt --allowed-host mymac.local
"""

_SHORTEST_KEY = 16  # characters
_PATIENCE = 5  # seconds that an answer may still take once the server is told to end


def setup_arg_parser() -> argparse.ArgumentParser:
    """A parser with mlx_lm.server's flags where they have a meaning here, and ours."""
    stock = argparse.ArgumentParser(add_help=False)
    stock.add_argument("--adapter-path", help="LoRA adapters for the trunk")
    stock.add_argument("--trust-remote-code", action="store_true", help="Run Python code that comes with the model")
    stock.add_argument("--chat-template", help="A chat template instead of the model's own")
    stock.add_argument(
        "--chat-template-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""What the chat template is told, e.g. '{"enable_thinking": false}'""",
    )
    stock.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    group = stock.add_argument_group("where to listen")
    group.add_argument("--host", default="127.0.0.1", help="Address; others than this machine's own need a key")
    group.add_argument("--port", type=int, default=8080, help="Port, 0 for any (default: %(default)s)")
    group.add_argument("--api-key-file", metavar="FILE", help="A file with the key that every request must bring")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="A name that clients call the server by, besides its address; may be given several times",
    )
    group = stock.add_argument_group("what a request gets if it does not say")
    group.add_argument("--temp", type=float, default=0.0, help="Temperature (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument("--top-k", type=int, default=0, help="(default: %(default)s, off)")
    group.add_argument("--min-p", type=float, default=0.0, help="(default: %(default)s, off)")
    group.add_argument("--max-tokens", type=int, default=512, help="Tokens of an answer (default: %(default)s)")
    group = stock.add_argument_group("what a request may ask for")
    group.add_argument("--most-prompt-tokens", type=int, default=32768, metavar="N", help="(default: %(default)s)")
    group.add_argument("--most-tokens", type=int, default=32768, metavar="N", help="(default: %(default)s)")
    group.add_argument(
        "--most-waiting", type=int, default=16, metavar="N", help="Requests that wait for their turn (default: 16)"
    )
    group = stock.add_argument_group("memory for contexts")
    group.add_argument(
        "--prompt-cache-bytes",
        type=parse_size,
        default="1GB",
        metavar="SIZE",
        help="For the state of prompts that may come again (default: %(default)s)",
    )
    group.add_argument(
        "--preamble-folder",
        metavar="FOLDER",
        help="Keep the state after system messages and tools there too, so that the next run need not read them again. "
        "The files tell of what was in them; they are yours alone (default: in memory only)",
    )
    group.add_argument(
        "--preamble-folder-bytes",
        type=parse_size,
        default="10GB",
        metavar="SIZE",
        help="What that folder may take; what was not used for the longest time leaves (default: %(default)s)",
    )
    group.add_argument("--kv-bits", type=int, help="Bits of the KV cache, e.g. 8 (default: not quantised)")
    group.add_argument("--kv-group-size", type=int, default=64, help="Its group size (default: %(default)s)")
    group.add_argument(
        "--quantized-kv-start", type=int, default=5000, help="Tokens before it is quantised (default: %(default)s)"
    )
    return extend_parser(stock, "Serve a Mixture-of-Experts model whose experts stay on disk.", EPILOG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _serve(setup_arg_parser(), argv)


def _serve(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Load, listen until a signal says to end, and end in order."""
    args, config = parse_arguments(parser, argv)
    _refuse_nonsense(args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    key = None if args.api_key_file is None else _read_key(Path(args.api_key_file).expanduser())
    metrics = Metrics()
    with Server((args.host, args.port), key, args.allowed_host) as server:
        load = streamed_load(args, config)
        kv_cache = {name: getattr(args, name) for name in ("kv_bits", "kv_group_size", "quantized_kv_start")}
        generations = Generations(
            lambda: load(args.model, **_load_options(args)),
            metrics,
            args.most_waiting,
            args.prompt_cache_bytes,
            args.prefill_step_size,
            kv_cache,
            None if args.preamble_folder is None else lambda model: _preambles(args, model, kv_cache),
        )
        server.service = Service(
            _name(args.model),
            generations,
            metrics,
            Limits(args.most_prompt_tokens, max(args.most_tokens, args.max_tokens)),
            _defaults(args),
            args.chat_template_args,
        )
        # shutdown() waits for serve_forever(), which this thread runs.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"listening on http://{host}:{server.server_port}/v1", file=sys.stderr, flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            generations.close(_PATIENCE)
            server.wait_for_answers(_PATIENCE)
            finish(generations.model.streaming, config)


def _refuse_nonsense(args: argparse.Namespace) -> None:
    """What can be known to be wrong before anything is read."""
    for name in ("max_tokens", "most_prompt_tokens", "most_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name} is {getattr(args, name)}: it must be a whole number from 1 on")
    if args.most_waiting < 0:
        raise ValueError(f"most_waiting is {args.most_waiting}: it must be a whole number from 0 on")
    if not isinstance(args.chat_template_args, dict):
        raise ValueError("chat_template_args must be a JSON object")
    for name, low, high in (("temp", 0, 2), ("top_p", 0, 1), ("min_p", 0, 1), ("top_k", 0, 2**31), ("port", 0, 65535)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"{name} is {getattr(args, name)}: it must be from {low} to {high}")
    if args.api_key_file is None and not _is_loopback(args.host):
        raise ValueError(f"{args.host} can be reached from other machines: that needs --api-key-file")


def _is_loopback(host: str) -> bool:
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _read_key(path: Path) -> str:
    key = path.read_text(encoding="utf-8").strip()
    if len(key) < _SHORTEST_KEY or not key.isascii() or len(key.split()) != 1:
        raise ValueError(f"{path} must hold one key, of {_SHORTEST_KEY} ASCII characters or more and no spaces")
    return key


def _preambles(args: argparse.Namespace, model: nn.Module, kv_cache: dict[str, Any]) -> Prefixes:
    settings = cache_settings(model, args.adapter_path) | {name: str(value) for name, value in kv_cache.items()}
    identity = model_identity(find_folder(args.model), settings, args.trust_remote_code)
    return Prefixes(Path(args.preamble_folder).expanduser(), args.preamble_folder_bytes, identity)


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    tokenizer_config = {"trust_remote_code": args.trust_remote_code}
    if args.chat_template is not None:
        tokenizer_config["chat_template"] = args.chat_template
    return {
        "adapter_path": args.adapter_path,
        "tokenizer_config": tokenizer_config,
        "trust_remote_code": args.trust_remote_code,
    }


def _name(model: str) -> str:
    """A repository's name, or that of a folder without the way to it."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temp,
        "top_p": args.top_p or 1.0,  # mlx-lm's 0 is off
        "top_k": args.top_k,
        "min_p": args.min_p,
    }
