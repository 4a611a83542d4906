"""Builds the native core with CMake. Needs a C++17 compiler, and no torch.

``FASTMAML_CUDA=auto|0|1`` says whether to compile the CUDA kernels.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command import build as build_command
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class FreshBuild(build_command.build):
    """Packs what is in the source now: modules of an earlier build may have gone since."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeExtension(Extension):
    """An extension whose sources CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Configures and builds; a failure of either fails the installation."""

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CMakeExtension):
            super().build_extension(ext)
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTMAML_VERSION={version()}",
            f"-DFASTMAML_CUDA={cuda()}",
        ]
        jobs = str(self.parallel or processors())
        run(configure)
        run([cmake, "--build", str(build), "--parallel", jobs])


def processors() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cuda() -> str:
    choice = os.environ.get("FASTMAML_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"FASTMAML_CUDA must be auto, 0 or 1, got {choice!r}")
    return choice


def run(command: list[str]) -> None:
    """Run a step of the build; where it fails its own messages come before ours."""
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            "the native core was not built, for the reason above; it needs a C++17 compiler such "
            "as g++ (CXX names another) and, with FASTMAML_CUDA=1, nvcc"
        )


def tool(name: str) -> str:
    """The build environment's own program, else the one on PATH."""
    local = Path(sys.executable).parent / name
    found = str(local) if local.exists() else shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build the native core: pip install {name}")
    return found


def version() -> str:
    text = (ROOT / "fastmaml" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("fastmaml/__init__.py must define __version__")
    return found.group(1)


setup(
    ext_modules=[CMakeExtension("fastmaml._core")],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
