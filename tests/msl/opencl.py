"""Compiles Metal text with clang as C++ for OpenCL, whose address spaces are as disjoint as Metal's.

The target is AMD's RDNA 3, with 32 lanes like Apple's GPUs and up to 256 registers a thread. Its register count stands
in for that of Apple's compiler, which runs on a Mac only.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import pytest

from tests.msl.generated import DTYPES, Text

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build"
OLDEST = 18
"""The first clang with ``__bf16`` on this target."""

LANGUAGE = [
    *("-x", "cl", "-cl-std=clc++2021", "-cl-no-stdinc", "-ffp-contract=off", "-fno-color-diagnostics"),
    *("-target", "amdgcn-amd-amdhsa", "-mcpu=gfx1100", "-nogpulib", f"-I{HERE}"),
]
WARNINGS = [
    *("-Wall", "-Wextra", "-Werror"),
    # Shared files define more than a kernel uses, and MLX passes it the template's parameters alike.
    *("-Wno-unused-function", "-Wno-unused-const-variable", "-Wno-unused-variable"),
]
ASSEMBLY = ["-O3", "-S", "-o", "-", "-Xclang", "-cl-ext=+cl_khr_fp16", *WARNINGS]
SYNTAX = [
    *("-fsyntax-only", "-Xclang", "-ast-dump"),
    *("-Xclang", "-cl-ext=+cl_khr_fp16,+__opencl_c_generic_address_space"),
]

# Arguments that differ between threads. As arguments they would be taken for uniform and need no registers.
POSITIONS = {
    "thread_index_in_simdgroup": "lane_of_thread()",
    "simdgroup_index_in_threadgroup": "__builtin_amdgcn_workitem_id_x() / 32",
    "threadgroup_position_in_grid": "{__builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y(), 0}",
}


class Compiled(NamedTuple):
    """The outcome of a compilation.

    Args:
        error (str): The first error or warning with its line; empty if there is none.
        registers (int): 32-bit registers of a thread.
        spilled (int): Bytes of memory that a thread needs besides.
    """

    error: str
    registers: int = 0
    spilled: int = 0


def clang() -> list[str]:
    """Return the command that runs clang, or skip the test."""
    command = _clang()
    if command is None:
        pytest.skip(f"no clang >= {OLDEST} that compiles for amdgcn; tests/msl/clang.sh unpacks one into build/clang")
    return command


@cache
def _clang() -> list[str] | None:
    unpacked = [
        ["env", f"LD_LIBRARY_PATH={path.parents[1] / 'lib'}:{library}", str(path)]
        for path in BUILD.glob("clang/usr/lib/llvm-*/bin/clang")
        for library in BUILD.glob("clang/usr/lib/*-linux-gnu")
    ]
    names = ["clang", *(f"clang-{version}" for version in range(OLDEST, OLDEST + 8))]
    for command in unpacked + [[path] for path in map(shutil.which, names) if path]:
        version = re.search(r"clang version (\d+)", _run([*command, "--version"]).stdout)
        if version and int(version[1]) >= OLDEST and "amdgcn" in _run([*command, "--print-targets"]).stdout:
            return command
    return None


def compiled(texts: Iterable[Text]) -> list[Compiled]:
    """Compile on all cores. Outcomes are kept in ``build/msl``."""
    clang()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(_compiled, texts))


def pointers_without_address_space(text: Text) -> set[str]:
    """Return the variables whose type does not name an address space, which Metal requires and clang does not."""
    done = _run([*clang(), *LANGUAGE, *SYNTAX, "-"], translated(text))
    declarations = re.findall(r"\b(?:VarDecl|ParmVarDecl) .*? (\w+) '([^']*__generic[^']*)'", done.stdout)
    assert declarations or not done.returncode, done.stderr
    return {f"{type_} {name}" for name, type_ in declarations}


def _compiled(text: Text) -> Compiled:
    source = translated(text)
    command = [*clang(), *LANGUAGE, *ASSEMBLY, "-"]
    key = hashlib.sha256("\0".join([*command, (HERE / "opencl.h").read_text(), source]).encode()).hexdigest()
    file = BUILD / "msl" / f"{key[:32]}.json"
    if file.exists():
        return Compiled(*json.loads(file.read_text()))
    outcome = _outcome(_run(command, source), source)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(outcome))
    part.replace(file)
    return outcome


def _outcome(done: subprocess.CompletedProcess[str], source: str) -> Compiled:
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error:" in line), lines[0] if lines else "clang failed")
        place = re.search(r"\bkernel:(\d+)", first)
        return Compiled(f"{first} -- {source.splitlines()[int(place[1]) + 1].strip()}" if place else first)
    fields = dict(re.findall(r"\.(\w+):\s+(\d+)", done.stdout))
    return Compiled("", int(fields["vgpr_count"]), int(fields["private_segment_fixed_size"]))


def translated(text: Text) -> str:
    """Return the kernel in C++ for OpenCL, with its lines where they were in Metal.

    OpenCL has no kernel templates: the values of the parameters are defined at the beginning of the body.
    """
    kernel = re.search(
        r"template <[^>]*>\n\[\[kernel\]\] void \w+\(\n(?P<parameters>.*?\]\])\) \{\n(?P<body>.*)\n\}\n"
        r"\ntemplate \[\[host_name.*",
        text.source,
        re.DOTALL,
    )
    assert kernel, f"MLX generates kernels of another form:\n{text.source}"
    definitions, parameters = [], []
    for name, value in text.template:
        if isinstance(value, mx.Dtype):
            definitions.append(f"using {name} = {DTYPES[value].replace('float32', 'float').replace('16', '16_t')};")
        else:
            definitions.append(f"constexpr {type(value).__name__} {name} = {str(value).lower()};")
    for parameter in kernel["parameters"].split(",\n"):
        declared = re.sub(r"\s*\[\[.*?\]\]", "", parameter)
        name = declared.split()[-1]
        if name in POSITIONS:
            definitions.append(f"{declared} = {POSITIONS[name]};")
        else:
            parameters.append(declared)
    return f"""#include "opencl.h"
#line 1 "kernel"
{text.source[: kernel.start()]}
__kernel __attribute__((reqd_work_group_size({text.threads}, 1, 1))) void run({", ".join(parameters)}) {{
{" ".join(definitions)}
{kernel["body"]}
}}
"""


def _run(command: list[str], source: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=source, capture_output=True, text=True)
