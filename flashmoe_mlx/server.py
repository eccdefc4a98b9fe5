"""Serve a model with streamed experts over an OpenAI-compatible API, on loopback only unless an API key is set.

flashmoe serve --model FOLDER_OR_REPO --ram-budget 12GB
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
from flashmoe_mlx.checkpoint.identity import model_identity, numeric_settings
from flashmoe_mlx.cli.arguments import extend_parser, flag, parse_arguments
from flashmoe_mlx.cli.chat_template import read_chat_template
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.run import finish, kv_cache_settings, streamed_load
from flashmoe_mlx.config import check_integer, parse_size
from flashmoe_mlx.generation.prefix_store import PrefixStore
from flashmoe_mlx.generation.prompt_cache import cache_settings
from flashmoe_mlx.generation.worker import Worker
from flashmoe_mlx.serving.http import Server
from flashmoe_mlx.serving.metrics import Metrics
from flashmoe_mlx.serving.routes import Handler
from flashmoe_mlx.serving.service import Limits, Service
from flashmoe_mlx.system.text import read_text

EPILOG = """examples:
  flashmoe serve --model mlx-community/Qwen3.5-397B-A17B-4bit --ram-budget 20GB
  curl http://127.0.0.1:8080/v1/chat/completions -d '{"messages": [{"role": "user", "content": "What is a heron?"}]}'
  flashmoe serve --host 0.0.0.0 --api-key-file key.txt --allowed-host mymac.local
"""

# Characters.
_MIN_KEY_LENGTH = 16
# Seconds that the running answer gets to finish after SIGTERM or Ctrl-C.
_SHUTDOWN_TIMEOUT = 5


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return a parser with the flags of mlx_lm.server that apply here, plus ours."""
    stock = argparse.ArgumentParser(add_help=False)
    stock.add_argument("--adapter-path", help="Path to LoRA adapters for the trunk")
    stock.add_argument("--trust-remote-code", action="store_true", help="Run Python code that comes with the model")
    stock.add_argument(
        "--chat-template", metavar="FILE", help="Use this chat template, a file or its text, instead of the model's own"
    )
    stock.add_argument(
        "--chat-template-args",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""Arguments of the chat template, e.g. '{"enable_thinking": false}'""",
    )
    stock.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    group = stock.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="Address to bind; any but loopback requires an API key")
    group.add_argument("--port", type=int, default=8080, help="Port, 0 for any free one (default: %(default)s)")
    group.add_argument("--api-key-file", metavar="FILE", help="File with the key that every request must send")
    group.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="Accept this name in the Host header, besides the server's address; may be repeated",
    )
    group = stock.add_argument_group("defaults of a request")
    group.add_argument("--temp", type=float, default=0.0, help="Temperature (default: %(default)s)")
    group.add_argument("--top-p", type=float, default=1.0, help="Nucleus sampling (default: %(default)s, off)")
    group.add_argument("--top-k", type=int, default=0, help="Top-k sampling (default: %(default)s, off)")
    group.add_argument("--min-p", type=float, default=0.0, help="Min-p sampling (default: %(default)s, off)")
    group.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="Tokens to generate (default: as many as the context and --max-completion-tokens allow)",
    )
    group = stock.add_argument_group("limits of a request")
    group.add_argument(
        "--max-prompt-tokens", type=int, default=32768, metavar="N", help="Longest prompt (default: %(default)s)"
    )
    group.add_argument(
        "--max-completion-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="Longest answer, and at least --max-tokens (default: %(default)s)",
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=16,
        metavar="N",
        help="Requests that may wait while another one runs; more get status 429 (default: %(default)s)",
    )
    group = stock.add_argument_group("KV cache and prefix cache")
    group.add_argument(
        "--prompt-cache-bytes",
        type=parse_size,
        default="1GB",
        metavar="SIZE",
        help="Memory of the prefix cache, which keeps the state of earlier prompts (default: %(default)s)",
    )
    group.add_argument(
        "--prefix-cache-dir",
        metavar="FOLDER",
        help="Also keep the state after system messages and tools in this folder, so that it survives a restart. "
        "The files reveal the text of the prompts; only you can read them (default: in memory only)",
    )
    group.add_argument(
        "--prefix-cache-dir-bytes",
        type=parse_size,
        default="10GB",
        metavar="SIZE",
        help="Size limit of that folder; the least recently used files are deleted (default: %(default)s)",
    )
    group.add_argument("--kv-bits", type=int, help="Quantize the KV cache to this many bits (default: off)")
    group.add_argument(
        "--kv-group-size", type=int, default=64, help="Group size of KV cache quantization (default: %(default)s)"
    )
    group.add_argument(
        "--quantized-kv-start",
        type=int,
        default=5000,
        help="Tokens after which the KV cache is quantized (default: %(default)s)",
    )
    return extend_parser(stock, "Serve a Mixture-of-Experts model whose experts stay on disk.", EPILOG)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): The command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _serve(setup_arg_parser(), argv)


def _serve(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Load the model, listen until a signal arrives, and shut down in order."""
    args, config = parse_arguments(parser, argv)
    _check_arguments(args)
    logging.basicConfig(level=args.log_level, format="%(asctime)s %(levelname)s %(message)s")
    key = None if args.api_key_file is None else _read_key(Path(args.api_key_file).expanduser())
    metrics = Metrics()
    with Server((args.host, args.port), Handler, key, args.allowed_host) as server:
        load = streamed_load(args, config)
        kv_cache = kv_cache_settings(args)
        worker = Worker(
            lambda: load(args.model, **_load_options(args)),
            metrics.add,
            args.max_queue,
            args.prompt_cache_bytes,
            args.prefill_step_size,
            kv_cache,
            None if args.prefix_cache_dir is None else lambda model: _prefix_store(args, model, kv_cache),
        )
        server.service = Service(
            _name(args.model),
            worker,
            metrics,
            Limits(args.max_prompt_tokens, max(args.max_completion_tokens, args.max_tokens or 0)),
            _defaults(args),
            args.chat_template_args,
        )
        # shutdown() waits for serve_forever() to return, and this thread runs it: call it from another one.
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"listening on http://{host}:{server.server_port}/v1", file=sys.stderr, flush=True)
        try:
            server.serve_forever(poll_interval=0.1)
        finally:
            worker.close(_SHUTDOWN_TIMEOUT)
            server.wait_for_answers(_SHUTDOWN_TIMEOUT)
            finish(worker.model.streaming, config)


def _check_arguments(args: argparse.Namespace) -> None:
    """Raise a ValueError for values that are wrong whatever the model is."""
    for name in ("max_tokens", "max_prompt_tokens", "max_completion_tokens"):
        if getattr(args, name) is not None:
            check_integer(flag(name), getattr(args, name))
    if args.max_queue < 0:
        raise ValueError(f"--max-queue is {args.max_queue}: it must not be negative")
    if not isinstance(args.chat_template_args, dict):
        raise ValueError("--chat-template-args must be a JSON object")
    for name, low, high in (("temp", 0, 2), ("port", 0, 65535)):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"{flag(name)} is {getattr(args, name)}: it must be from {low} to {high}")
    if args.api_key_file is None and not _is_loopback(args.host):
        raise ValueError(f"--host {args.host} is reachable from other machines: set --api-key-file")


def _is_loopback(host: str) -> bool:
    addresses = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _read_key(path: Path) -> str:
    key = read_text(path).strip()
    if len(key) < _MIN_KEY_LENGTH or not key.isascii() or len(key.split()) != 1:
        raise ValueError(f"{path} must hold one key of at least {_MIN_KEY_LENGTH} ASCII characters, without spaces")
    return key


def _prefix_store(args: argparse.Namespace, model: nn.Module, kv_cache: dict[str, Any]) -> PrefixStore:
    settings = cache_settings(model, args.adapter_path) | {name: str(value) for name, value in kv_cache.items()}
    identity = model_identity(find_folder(args.model), settings | numeric_settings(), args.trust_remote_code)
    return PrefixStore(Path(args.prefix_cache_dir).expanduser(), args.prefix_cache_dir_bytes, identity)


def _load_options(args: argparse.Namespace) -> dict[str, Any]:
    template = args.chat_template
    return {"tokenizer_config": {} if template is None else {"chat_template": read_chat_template(template)}}


def _name(model: str) -> str:
    """Return the name of a repository, or the last part of a folder's path."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def _defaults(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temp,
        # mlx-lm's 0 means off, which is OpenAI's 1.
        "top_p": args.top_p or 1.0,
        "top_k": args.top_k,
        "min_p": args.min_p,
    }
