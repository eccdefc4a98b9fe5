"""Runs Metal kernels on the CPU, from the very text that MLX compiles on a Mac.

``metal.h`` makes the text C++, ``threads.h`` runs the threads of a threadgroup, and ``main.cpp`` lays out the buffers
and says what a kernel does wrong: a barrier that is missing, an access out of bounds, an element that nobody writes.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.support.metal_text import metal_text

HERE = Path(__file__).parent
FLAGS = [
    *("-std=c++17", "-O1", "-pthread", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=alignment,bounds,integer-divide-by-zero,shift-exponent", "-fno-sanitize-recover=all"),
    # Metal has no double.
    "-Werror=double-promotion",
]
# GCC rounds every half, and takes 1.0 for a float, if it is told to. A frame may have half of a thread's stack.
GCC_FLAGS = ["-fexcess-precision=16", "-fsingle-precision-constant", "-Werror=frame-larger-than=32768"]
CLANG_FLAGS = ["-Wframe-larger-than=32768", "-Werror=frame-larger-than"]
# Seconds.
TIMEOUT = 60


class EmulationError(Exception):
    """The kernel does not compile, or does what a Metal kernel must not do."""


class Emulated:
    """Stands in for a kernel that ``mx.fast.metal_kernel`` made: the same call, run by the emulator.

    Inputs are passed row-contiguous, as ``mx.fast.metal_kernel`` does unless it is told otherwise.
    """

    def __init__(self, kernel: Callable[..., list[mx.array]]) -> None:
        self.kernel = kernel

    def __call__(
        self,
        *,
        inputs: Sequence[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] = (),
    ) -> list[mx.array]:
        source = metal_text(
            self.kernel,
            inputs,
            output_shapes=output_shapes,
            output_dtypes=output_dtypes,
            grid=grid,
            threadgroup=threadgroup,
            template=template,
        )
        names = [name for _, name, is_buffer in _parameters(source) if is_buffer]
        filled = _filled(names[: -len(output_shapes)], inputs)
        sizes = [int(np.prod(shape)) * dtype.size for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        command = [str(number) for number in (_build(source), *grid, *threadgroup)]
        for name, data in filled:
            command += [name, str(data.nbytes), str(data.itemsize), "in"]
        for name, size, dtype in zip(names[-len(sizes) :], sizes, output_dtypes, strict=True):
            command += [name, str(size), str(dtype.size), "out"]
        result = np.frombuffer(_run(command, b"".join(data.tobytes() for _, data in filled), source), np.uint8)
        parts = np.split(result, np.cumsum(sizes[:-1]))
        outputs = zip(parts, output_dtypes, output_shapes, strict=True)
        return [mx.array(part).view(dtype).reshape(shape) for part, dtype, shape in outputs]


def _parameters(source: str) -> list[tuple[str, str, bool]]:
    """The type and name of each parameter of the kernel, and whether it is a buffer or a position."""
    signature = re.search(r"\[\[kernel\]\] void \w+\(\n(.*?\]\])\) \{", source, re.DOTALL)
    assert signature, f"a kernel that MLX printed in a new way:\n{source}"
    found = re.findall(r"^  (.+) (\w+) \[\[(\w+)", signature[1], re.MULTILINE)
    return [(type_, name, attribute == "buffer") for type_, name, attribute in found]


def _filled(names: Sequence[str], inputs: Sequence[mx.array]) -> list[tuple[str, np.ndarray]]:
    """The buffers that a kernel reads: each input, followed by what the kernel asks of its shape, strides and ndim."""
    left = iter(inputs)
    about: dict[str, np.ndarray] = {}
    filled = []
    for name in names:
        if name not in about:
            x = next(left)
            raw = np.array(mx.contiguous(x).reshape(-1).view(mx.uint8))
            # Numpy has no bfloat16; bytes are all that is needed.
            about[name] = raw.view(f"V{x.dtype.size}")
            about[f"{name}_shape"] = np.array(x.shape, np.int32)
            about[f"{name}_strides"] = np.array([np.prod(x.shape[i + 1 :]) for i in range(x.ndim)], np.int64)
            about[f"{name}_ndim"] = np.array(x.ndim, np.int32)
        filled.append((name, about[name]))
    return filled


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulator")


@cache
def _compiler() -> list[str]:
    name = os.environ.get("CXX", "c++")
    version = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    return [name, *FLAGS, *(CLANG_FLAGS if "clang" in version else GCC_FLAGS)]


@cache
def _build(source: str) -> Path:
    """Compile a kernel once, and return the program that runs it."""
    program = Path(_folder().name) / str(_build.cache_info().misses)
    command = [*_compiler(), "-I", str(HERE), "-x", "c++", "-", "-o", str(program)]
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(command, input=_translated(source), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise EmulationError(_message(done.stderr, source))
    return program


def _translated(source: str) -> str:
    """The kernel as C++, its lines where they were, and a call that passes it what it asks for."""
    name = re.findall(r"\[\[kernel\]\] void (\w+)", source)[-1]
    arguments = []
    buffers = count()
    for type_, parameter, is_buffer in _parameters(source):
        value = f"({type_.rstrip('*&')}*)argument({next(buffers)})" if is_buffer else f"self->{parameter}"
        arguments.append(f"*{value}" if type_.endswith("&") else value)

    if instance := re.search(r"^template \[\[host_name.* decltype\((.*)\) .*", source, re.MULTILINE):
        name = instance[1]
        # Attributes that C++ does not allow here; the call instantiates, too.
        source = source.replace(instance[0], "")
    source = re.sub(r"#include <metal_\w+>", "", source)
    variable = r"\w+(?:\[[^\]]*\])*"
    declaration = rf"\bthreadgroup[ \t]+([\w:<>, ]*[\w>])[ \t]+({variable}(?:,[ \t]*{variable})*);"
    source = re.sub(declaration, _shared, source)
    return f"""
#include "metal.h"
namespace emulator {{ char* argument(int); }}
#line 1 "kernel"
{source}
#line 1 "call"
void emulator::run_thread() {{ {name}({", ".join(arguments)}); }}
#include "main.cpp"
"""


def _shared(declaration: re.Match[str]) -> str:
    """Declare variables of a threadgroup as references to memory that its threads share."""
    variables = re.findall(r"(\w+)((?:\[[^\]]*\])*)", declaration[2])
    type_ = declaration[1]
    return " ".join(f"{type_} (&{name}){extent} = emulator::shared<{type_}{extent}>();" for name, extent in variables)


def _run(command: list[str], content: bytes, source: str) -> bytes:
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise EmulationError(f"the kernel ran for more than {TIMEOUT} seconds") from None
    if done.returncode:
        errors = done.stderr.decode() or f"the kernel was stopped by signal {-done.returncode}"
        raise EmulationError(_message(errors, source))
    return done.stdout


def _message(errors: str, source: str) -> str:
    """The first error as one line, with the line of the kernel that it is about."""
    lines = errors.splitlines()
    line = next((line for line in lines if "error:" in line), lines[0])
    place = re.search(r"\bkernel:(\d+)", line)
    return f"{line} -- {source.splitlines()[int(place[1]) - 1].strip()}" if place else line
