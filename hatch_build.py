"""Build the native CPU kernels into wheels for Linux. Without GCC 12 or newer the package is built without them."""

import hashlib
import subprocess
import sys
import sysconfig
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Run CMake on ``native/`` for a wheel or an editable install.

    On a Mac nothing is built, because there MLX computes on the GPU: the wheel is pure Python.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library if it is missing or outdated, and put it into the wheel.

        Args:
            version (str): ``"standard"`` or ``"editable"``; both are built alike.
            build_data (dict): hatchling's description of the wheel, which is changed in place.
        """
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        root = Path(self.root)
        library = root / "flashmoe_mlx" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        build = root / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # pip makes a new environment for each build, from which CMake would start anew: compare inputs instead.
        stamp = build / "inputs"
        inputs = _inputs(root)
        current = library.exists() and stamp.exists() and stamp.read_text() == inputs
        if not current and not self._build(root, build, library):
            return
        stamp.write_text(inputs)
        build_data["artifacts"].append(f"/flashmoe_mlx/{library.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _build(self, root: Path, build: Path, library: Path) -> bool:
        """Compile the library; return whether that worked."""
        library.unlink(missing_ok=True)
        configure = ["cmake", "-S", str(root / "native"), "-B", str(build), "-G", "Ninja", "--fresh"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.app.display_warning(
                f"the native CPU kernels were not built ({error}): install GCC 12 or newer and run pip again"
            )
            return False
        return True


def _inputs(root: Path) -> str:
    """Identify everything the library is compiled from: versions, and a digest of the sources."""
    files = [file for file in sorted((root / "native").rglob("*")) if file.is_file()]
    text = b"".join(file.name.encode() + file.read_bytes() for file in files)
    versions = " ".join(f"{name} {installed(name)}" for name in ("mlx", "nanobind"))
    return f"{versions} {hashlib.sha256(text).hexdigest()}"
