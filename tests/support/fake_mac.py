"""A pytest plugin that lets this process pass for a Mac, as far as Python can tell.

    python -m pytest -p tests.support.fake_mac tests/streaming

``sys.platform`` is ``darwin``, ``os`` lacks what only Linux has, the Linux build of the native kernels is gone, a fork
raises, and F_RDAHEAD succeeds. A name that only Linux has fails the tests then instead of the first run on a Mac.
Processes that tests start are what they are.
"""

import asyncio
import ctypes.util
import fcntl
import multiprocessing.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from typing import Any, NoReturn

import huggingface_hub
import hypothesis
import mlx_lm
import numpy
import openai
import psutil
import rich.console
import tqdm

DECIDED = (asyncio, ctypes.util, multiprocessing.util, platform, shutil, socket, subprocess, tempfile, uuid)
DECIDED += (huggingface_hub, hypothesis, mlx_lm, numpy, openai, psutil, rich.console, tqdm)
"""Modules that choose what they call when they are imported, so that they must have seen Linux."""

# Prefixes and names. What the standard library has chosen to use stays: O_TMPFILE and extended attributes.
LINUX_ONLY = (
    *("CLONE_", "EFD_", "GRND_", "MFD_", "POSIX_FADV_", "RWF_", "SPLICE_", "TFD_"),
    *("O_DIRECT", "O_LARGEFILE", "O_NOATIME", "O_PATH", "O_RSYNC", "P_PIDFD", "RTLD_DEEPBIND"),
    *("SCHED_BATCH", "SCHED_IDLE", "SCHED_RESET_ON_FORK"),
    *("copy_file_range", "eventfd", "fdatasync", "getrandom", "getresgid", "getresuid", "memfd_create", "pidfd_open"),
    *("pipe2", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "sched_getparam", "sched_getscheduler"),
    *("sched_rr_get_interval", "sched_setaffinity", "sched_setparam", "sched_setscheduler", "setns", "setresgid"),
    *("setresuid", "splice", "timerfd_", "unshare"),
)
# Of macOS.
F_RDAHEAD = 45

_fcntl = fcntl.fcntl


def linux_names() -> list[str]:
    """Return the names in ``os`` that a Mac does not have."""
    return [name for name in dir(os) if name.startswith(LINUX_ONLY) and name != "O_DIRECTORY"]


def mac_fcntl(file: Any, command: int, argument: Any = 0) -> Any:
    """Accept F_RDAHEAD, which Linux does not know."""
    return 0 if command == F_RDAHEAD else _fcntl(file, command, argument)


def no_fork() -> NoReturn:
    """Refuse what works on a Mac until the child uses Metal.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("Metal does not work in a forked child: start a new process")


def pretend() -> None:
    """Turn this process into a Mac. There is no way back."""
    for name in linux_names():
        delattr(os, name)
    fcntl.fcntl = mac_fcntl
    os.fork = no_fork
    # An import of it raises ImportError, as where it was not built.
    sys.modules["flashmoe_mlx._native"] = None  # type: ignore[assignment]
    sys.platform = "darwin"


pretend()
