"""Check a model's files: their headers, the digests that the hub published, and a manifest of every expert.

flashmoe verify FOLDER_OR_REPO
"""

if __name__ == "__main__":
    from flashmoe_mlx.cli.commands import run_module

    run_module(__file__)

import argparse
from collections.abc import Sequence, Sized
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from flashmoe_mlx.checkpoint.expert_table import ExpertTable
from flashmoe_mlx.checkpoint.folder import Checkpoint, find_folder
from flashmoe_mlx.checkpoint.hub_digests import downloaded_digests, hub_digests, mismatched_files
from flashmoe_mlx.checkpoint.manifest import Manifest, digest
from flashmoe_mlx.cli.arguments import command_parser
from flashmoe_mlx.cli.errors import one_line_errors
from flashmoe_mlx.cli.progress import bytes_read
from flashmoe_mlx.config import check_integer
from flashmoe_mlx.model.families import find_experts
from flashmoe_mlx.model.load import load_lazily
from flashmoe_mlx.ops.dispatch import choose_backend
from flashmoe_mlx.streaming.counters import Counters
from flashmoe_mlx.streaming.reader import Reader
from flashmoe_mlx.system.text import check_text

EPILOG = """examples:
  flashmoe verify ./model --quick
  flashmoe verify mlx-community/Qwen3.5-397B-A17B-4bit --sha256
  flashmoe verify ./model --write-manifest model.manifest.json
  flashmoe verify ./model --manifest model.manifest.json
"""

_THREADS = 16

_BATCH_NBYTES = 1 << 26
"""Bytes of experts that are read together."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = command_parser(
        "Check a model's files. Without flags: all headers, the index, that every expert is found, and that a sample "
        "of experts is read as MLX reads it.",
        EPILOG,
    )
    parser.add_argument("model", help="The path of a model folder, or a Hugging Face repo")
    parser.add_argument("--quick", action="store_true", help="Check headers and index only")
    parser.add_argument(
        "--sample",
        type=int,
        default=3,
        metavar="N",
        help="Layers of which one expert is compared with what MLX reads. Each takes the memory of a layer "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--sha256", action="store_true", help="Compare every byte with the digests that the hub gave with the download"
    )
    parser.add_argument("--repo", help="Compare every byte with the digests that the hub publishes of this repo now")
    parser.add_argument("--revision", help="Branch, tag or commit of a repo")
    parser.add_argument(
        "--write-manifest",
        type=Path,
        metavar="FILE",
        help="Write the digest of every expert to FILE, or complete FILE if that was interrupted",
    )
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="Compare every expert with the digests in FILE")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="Accept a model whose config names code to run"
    )
    return parser


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        argv (Sequence[str], optional): Command line without the program's name. Default: ``sys.argv[1:]``.
    """
    args = setup_arg_parser().parse_args(argv)
    check_text("the model's path", args.model)
    _check(args)
    folder = find_folder(args.model, args.revision)
    checkpoint = Checkpoint(folder, args.trust_remote_code)
    size = tqdm.format_sizeof(sum(tensor.span.nbytes for tensor in checkpoint.tensors.values()), "B")
    print(f"headers: valid, {len(checkpoint.tensors)} tensors of {size} in {_count(checkpoint.files, 'file')}")
    model, _ = load_lazily(checkpoint, {}, args.trust_remote_code)
    switches, tables = find_experts(model, checkpoint, choose_backend())
    print(f"experts: all found, {sum(table.experts for table in tables)} in {_count(tables, 'layer')}")
    if args.quick:
        return
    reader = Reader(checkpoint.files, _THREADS, Counters())
    sample = _spread(tables, args.sample)
    for table in sample:
        _compare(reader, table, dict(tree_flatten(switches[table.layer].parameters())))
    print(f"sample: matches what MLX reads, {_count(sample, 'layer')}")
    del model, switches
    if args.sha256 or args.repo:
        _check_published(folder, args.repo, args.revision)
    if args.write_manifest is not None:
        _write_manifest(checkpoint, reader, tables, args.write_manifest)
    if args.manifest is not None:
        _check_manifest(checkpoint, reader, tables, args.manifest)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before a file is read."""
    if args.quick and (args.sha256 or args.repo or args.manifest or args.write_manifest):
        raise ValueError("--quick reads headers only: leave it out, or leave out the flags that read every byte")
    check_integer("--sample", args.sample, minimum=0)
    if args.write_manifest is not None and not args.write_manifest.absolute().parent.is_dir():
        raise ValueError(f"cannot write {args.write_manifest}: there is no folder {args.write_manifest.parent}")


def _spread(tables: Sequence[ExpertTable], count: int) -> list[ExpertTable]:
    """Return up to ``count`` of the layers, at equal distances from first to last."""
    last = len(tables) - 1
    count = min(count, len(tables))
    return [tables[number] for number in sorted({round(i * last / max(1, count - 1)) for i in range(count)})]


def _count(items: Sized, noun: str) -> str:
    return f"{len(items)} {noun}" if len(items) == 1 else f"{len(items)} {noun}s"


def _compare(reader: Reader, table: ExpertTable, parameters: dict[str, mx.array]) -> None:
    """Compare one expert as it is streamed with what MLX reads, for which it loads the whole layer."""
    expert = table.experts // 2
    buffers = _read(reader, table, [expert])[0]
    for part, buffer in zip(table.parts, buffers, strict=True):
        # Compared as bytes, because numpy has no bfloat16. A part may be a scalar.
        row = mx.contiguous(mx.take(parameters[part.name], mx.array([expert]), axis=0)).reshape(-1).view(mx.uint8)
        if np.asarray(row).tobytes() != buffer:
            raise ValueError(
                f"expert {expert} of {table.layer}: {part.name} differs from what MLX reads. Please report this"
            )


def _check_published(folder: Path, repo: str | None, revision: str | None) -> None:
    digests = downloaded_digests(folder) if repo is None else hub_digests(repo, revision, folder)
    without = sorted(file.name for file in folder.glob("model*.safetensors") if file.name not in digests)
    if without:
        raise ValueError(
            f"no published digest of {without[0]} is known: huggingface_hub did not download it, or it is not in that "
            "repository. Name the right one with --repo"
        )
    total = sum((folder / name).stat().st_size for name in digests)
    with bytes_read(total, "SHA-256") as bar:
        wrong = mismatched_files(folder, digests, bar.update)
    if wrong:
        raise ValueError(f"{folder}: {', '.join(sorted(wrong))} differ from what the hub published. Download again")
    print(f"SHA-256: matches what the hub published, {_count(digests, 'file')}")


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
    total = sum(map(len, manifest.layers.values()))
    print(f"manifest: wrote {path}, {total} experts, {_count(todo, 'layer')} new")


def _check_manifest(checkpoint: Checkpoint, reader: Reader, tables: Sequence[ExpertTable], path: Path) -> None:
    manifest = Manifest.load(path, checkpoint)
    with bytes_read(sum(map(_nbytes, tables)), "Experts") as bar:
        for table in tables:
            for experts in _groups(table):
                for expert, buffers in zip(experts, _read(reader, table, experts), strict=True):
                    manifest.refuse_damaged(table, expert, digest(table, buffers))
                bar.update(table.expert_nbytes * len(experts))
    print(f"manifest: matches {path}, {sum(table.experts for table in tables)} experts")


def _read(reader: Reader, table: ExpertTable, experts: Sequence[int]) -> list[list[memoryview]]:
    """Return the bytes of each part of each expert."""
    found = [[memoryview(bytearray(span.nbytes)) for span in table.spans[expert]] for expert in experts]
    reader.read(table.reads(experts, found))
    return found


def _groups(table: ExpertTable) -> list[range]:
    """Return a layer's experts in groups that are read together."""
    step = max(1, _BATCH_NBYTES // table.expert_nbytes)
    return [range(first, min(first + step, table.experts)) for first in range(0, table.experts, step)]


def _nbytes(table: ExpertTable) -> int:
    return table.expert_nbytes * table.experts
