"""Check a model's files: what their headers say, what the hub published, and what was read from them before.

python -m flashmoe_mlx.verify FOLDER_OR_REPO
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.checkpoint.hub_digests import differing, downloaded_digests, hub_digests
from flashmoe_mlx.checkpoint.manifest import Manifest, digest
from flashmoe_mlx.cli.arguments import command_parser
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import bytes_read
from flashmoe_mlx.model.families import find_experts
from flashmoe_mlx.model.load import load_lazily
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader

EPILOG = """examples:
  python -m flashmoe_mlx.verify ./model --quick
  python -m flashmoe_mlx.verify mlx-community/Qwen3.5-397B-A17B-4bit --sha256
  python -m flashmoe_mlx.verify ./model --write-manifest model.manifest.json
  python -m flashmoe_mlx.verify ./model --manifest model.manifest.json
"""

_THREADS = 16
_AT_ONCE = 1 << 26  # bytes of experts that are read before they are digested


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = command_parser(
        "Check a model's files. Without flags: every header, the index, that all experts can be found, and "
        "that a sample of them is read as MLX itself would read it.",
        EPILOG,
    )
    parser.add_argument("model", help="The path of a model folder, or a Hugging Face repo")
    parser.add_argument("--quick", action="store_true", help="Only headers, index and where the experts are")
    parser.add_argument(
        "--sample",
        type=int,
        default=3,
        metavar="N",
        help="Layers of which one expert is compared with what MLX reads; each takes a layer's memory (default: 3)",
    )
    parser.add_argument(
        "--sha256", action="store_true", help="Compare every byte with what the hub published when it was downloaded"
    )
    parser.add_argument("--repo", help="With --sha256: ask the hub what it publishes of this repo now")
    parser.add_argument("--revision", help="With a repo: branch, tag or commit")
    parser.add_argument(
        "--write-manifest",
        type=Path,
        metavar="FILE",
        help="Write the digest of every expert to FILE. If that was interrupted, it goes on where it was",
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="Compare every expert with the digests in FILE")
    parser.add_argument("--trust-remote-code", action="store_true", help="Take a model that names code to run")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv: the command line without the program's name. Default: ``sys.argv[1:]``.
    """
    with one_line_errors():
        _verify(setup_arg_parser().parse_args(argv))


def _verify(args: argparse.Namespace) -> None:
    if args.quick and (args.sha256 or args.repo or args.manifest or args.write_manifest):
        raise ValueError("--quick reads no more than headers: leave it out, or the flags that read every byte")
    if args.sample < 0:
        raise ValueError(f"--sample is {args.sample}: it must be a whole number from 0 on")
    if args.write_manifest is not None and not args.write_manifest.absolute().parent.is_dir():
        raise ValueError(f"{args.write_manifest} cannot be written: there is no folder {args.write_manifest.parent}")
    folder = find_folder(args.model, args.revision)
    checkpoint = Checkpoint(folder, args.trust_remote_code)
    size = tqdm.format_sizeof(sum(tensor.span.nbytes for tensor in checkpoint.tensors.values()), "B")
    print(f"headers: {len(checkpoint.tensors)} tensors, {size} in {len(checkpoint.files)} files, are sound")
    model, _ = load_lazily(checkpoint, {}, args.trust_remote_code)
    switches, tables = find_experts(model, checkpoint)
    print(f"experts: {sum(table.experts for table in tables)} in {len(tables)} layers are all there")
    if args.quick:
        return
    reader = Reader(checkpoint.files, _THREADS, Counters())
    count = min(args.sample, len(tables))
    for number in sorted({round(place * (len(tables) - 1) / max(1, count - 1)) for place in range(count)}):
        _compare(reader, tables[number], dict(tree_flatten(switches[tables[number].layer].parameters())))
    print(f"sample: experts of {count} layers are what MLX reads")
    del model, switches
    if args.sha256 or args.repo:
        _check_published(folder, args.repo, args.revision)
    if args.write_manifest is not None:
        _write_manifest(checkpoint, reader, tables, args.write_manifest)
    if args.manifest is not None:
        _check_manifest(checkpoint, reader, tables, args.manifest)


def _compare(reader: Reader, table: ExpertTable, parameters: dict[str, mx.array]) -> None:
    """Compare one expert as it is streamed with what MLX reads, which is all of the layer."""
    expert = table.experts // 2
    buffers = _read(reader, table, [expert])[0]
    for part, buffer in zip(table.parts, buffers, strict=True):
        # As words, because Python knows no bfloat16. A part may be a scalar.
        row = mx.contiguous(mx.take(parameters[part.name], mx.array([expert]), axis=0)).reshape(-1).view(mx.uint8)
        if np.asarray(row).tobytes() != buffer:
            raise ValueError(f"expert {expert} of {table.layer}: {part.name} is not what MLX reads. Please report this")


def _check_published(folder: Path, repo: str | None, revision: str | None) -> None:
    digests = downloaded_digests(folder) if repo is None else hub_digests(repo, revision, folder)
    without = sorted(file.name for file in folder.glob("model*.safetensors") if file.name not in digests)
    if without:
        raise ValueError(
            f"nothing here tells what the hub published of {without[0]}, since huggingface_hub did not download it or "
            "it is not in that repository. Name the right one with --repo"
        )
    total = sum((folder / name).stat().st_size for name in digests)
    with bytes_read(total, "SHA-256") as bar:
        wrong = differing(folder, digests, bar.update)
    if wrong:
        raise ValueError(f"{folder}: {', '.join(sorted(wrong))} differ from what the hub published. Download again")
    print(f"SHA-256: {len(digests)} files are what the hub published")


def _write_manifest(checkpoint: Checkpoint, reader: Reader, tables: Sequence[ExpertTable], path: Path) -> None:
    manifest = Manifest.load(path, checkpoint) if path.exists() else Manifest.of(checkpoint)
    todo = [table for table in tables if table.layer not in manifest.layers]
    with bytes_read(sum(map(_nbytes, todo)), "Manifest") as bar:
        for table in todo:
            digests = []
            for experts in _groups(table):
                digests += [digest(table, buffers) for buffers in _read(reader, table, experts)]
                bar.update(table.expert_nbytes * len(experts))
            manifest.layers[table.layer] = digests
            manifest.save(path)
    print(
        f"manifest: {path} has the digests of {sum(map(len, manifest.layers.values()))} experts, {len(todo)} layers new"
    )


def _check_manifest(checkpoint: Checkpoint, reader: Reader, tables: Sequence[ExpertTable], path: Path) -> None:
    manifest = Manifest.load(path, checkpoint)
    with bytes_read(sum(map(_nbytes, tables)), "Experts") as bar:
        for table in tables:
            for experts in _groups(table):
                for expert, buffers in zip(experts, _read(reader, table, experts), strict=True):
                    manifest.refuse_damaged(table, expert, digest(table, buffers))
                bar.update(table.expert_nbytes * len(experts))
    print(f"manifest: {sum(table.experts for table in tables)} experts are what they were when {path} was written")


def _read(reader: Reader, table: ExpertTable, experts: Sequence[int]) -> list[list[memoryview]]:
    """The bytes of each part of each expert."""
    found = [[memoryview(bytearray(span.nbytes)) for span in table.spans[expert]] for expert in experts]
    reader.read(table.reads(experts, found))
    return found


def _groups(table: ExpertTable) -> list[range]:
    """A layer's experts, as many together as are read at once."""
    step = max(1, _AT_ONCE // table.expert_nbytes)
    return [range(first, min(first + step, table.experts)) for first in range(0, table.experts, step)]


def _nbytes(table: ExpertTable) -> int:
    return table.expert_nbytes * table.experts
