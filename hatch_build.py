"""Builds the native CPU kernels into the package where there is a C++ compiler; without one the package works too."""

import hashlib
import subprocess
import sys
import sysconfig
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):
    """Runs CMake on ``native/``. On a Mac nothing is built: there MLX computes on the GPU."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or sys.platform != "linux":
            return
        root = Path(self.root)
        library = root / "flashmoe_mlx" / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
        build = root / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        # pip builds in a new folder each time, where CMake alone would build everything again.
        made_of = build / "made_of"
        current = library.exists() and made_of.exists() and made_of.read_text() == _inputs(root)
        if not current and not self._build(root, build, library):
            return
        made_of.write_text(_inputs(root))
        build_data["artifacts"].append(f"/flashmoe_mlx/{library.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _build(self, root: Path, build: Path, library: Path) -> bool:
        library.unlink(missing_ok=True)
        configure = ["cmake", "-S", str(root / "native"), "-B", str(build), "-G", "Ninja", "--fresh"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError):
            self.app.display_warning("native CPU kernels left out: with a C++20 compiler, run pip again to have them")
            return False
        return True


def _inputs(root: Path) -> str:
    """Return the versions and a digest of the sources that the library is built from."""
    text = b"".join(file.read_bytes() for file in sorted((root / "native").rglob("*")) if file.is_file())
    versions = " ".join(f"{name} {installed(name)}" for name in ("mlx", "nanobind"))
    return f"{versions} {hashlib.sha256(text).hexdigest()}"
