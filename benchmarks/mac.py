"""Measures what is not known about this Mac yet: 15 minutes, 8 GB of memory, and 4 GB of disk at most.

    make mac
    python -m benchmarks.mac --quick        # two minutes: shows that everything runs; also on Linux

Each section is a process of its own, so that one that fails or hangs takes nothing with it. A section that this machine
or this version cannot run is named with the reason. Two files are written: ``report.md``, plain sentences that begin
with the defaults that this machine contradicts, and ``report.json``, all figures. The last line is the same JSON.

Quit other programs first, and keep a laptop plugged in.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.mac_report import page
from benchmarks.mac_sections import SECTIONS, NotRun, Settings
from flashmoe_mlx.system.atomic_write import replacing

SECONDS = 15 * 60


def run_section(name: str, settings: Settings, arguments: list[str], seconds: float) -> dict[str, Any]:
    """Run a section in a process of its own; return its figures, or why there are none.

    Args:
        name (str): A key of ``SECTIONS``.
        settings (Settings): Where the checkpoint is.
        arguments (list[str]): For the process.
        seconds (float): Time that is left for all sections.
    """
    section = SECTIONS[name]
    if section.decodes and not (settings.checkpoint / "config.json").exists():
        return {"not_run": "needs the checkpoint"}
    if seconds < 5:
        return {"not_run": f"the {SECONDS // 60} minutes are over"}
    command = [sys.executable, "-m", "benchmarks.mac", "--section", name, *arguments]
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=min(section.seconds, seconds))
    except subprocess.TimeoutExpired as expired:
        return {"failed": f"took longer than {expired.timeout:.0f} s"}
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        return {"failed": lines[-1] if lines else f"ended with code {done.returncode}", "stderr": lines[-20:]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    warned = [line for line in lines if "warning" in line.lower()]
    figures |= {"section_seconds": round(time.perf_counter() - begin, 1)}
    return figures | {"warnings": warned} if warned else figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small settings, whose figures mean little")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="run these sections (default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path("build/mac"), help="folder of the two reports (default: %(default)s)"
    )
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        settings = Settings.quick(args.folder) if args.quick else Settings(args.folder)
        try:
            SECTIONS[args.section].refuse_elsewhere()
            figures = SECTIONS[args.section].run(settings)
        except NotRun as reason:
            figures = {"not_run": str(reason)}
        print(json.dumps(figures))
        return

    begin = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    folder = Path(tempfile.mkdtemp(dir=args.out))
    settings = Settings(folder)
    chosen = {"machine", "checkpoint", *(args.only or SECTIONS)}
    try:
        for name in (name for name in SECTIONS if name in chosen):
            left = SECONDS - (time.monotonic() - begin)
            print(f"{name} ...", file=sys.stderr, flush=True)
            arguments = ["--folder", str(folder), *["--quick"] * args.quick]
            results[name] = run_section(name, settings, arguments, left)
    finally:
        shutil.rmtree(folder)
        # Also of a run that was interrupted.
        with replacing(args.out / "report.json") as unfinished:
            unfinished.write_text(json.dumps(results, indent=2))
    report = page(results)
    with replacing(args.out / "report.md") as unfinished:
        unfinished.write_text(report)
    print(report)
    print(f"{args.out / 'report.md'} and {args.out / 'report.json'} are written")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
