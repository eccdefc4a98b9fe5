"""Builds the native CPU kernels into the package where there is a C++ compiler; without one the package works too."""

import subprocess
import sys
import sysconfig
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
        library.unlink(missing_ok=True)
        build = root / "build" / f"native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        configure = ["cmake", "-S", str(root / "native"), "-B", str(build), "-G", "Ninja", "--fresh"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={library.parent}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError):
            self.app.display_warning("native CPU kernels left out: with a C++20 compiler, run pip again to have them")
            return
        build_data["artifacts"].append(f"/flashmoe_mlx/{library.name}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
