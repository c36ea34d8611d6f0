"""Compiles the native library as part of an installation; pyproject.toml says all else."""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from model.backends.native import builds  # noqa: E402


class BuildNative(build_ext):
    """Libraries for ctypes: they know nothing of Python, and neither do their names."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def build_extensions(self) -> None:
        paths = {build: Path(self.get_ext_fullpath(_name(build))) for build in chosen}
        for path in paths.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            builds.compile_all(paths)
        except builds.BuildError as error:
            raise SystemExit(str(error)) from None


def _name(build: builds.Build) -> str:
    return f"model.backends.native._{build.name}"


try:
    chosen, why = builds.plan(os.environ.get(builds.CHOICE) or "auto")
except builds.BuildError as error:
    raise SystemExit(str(error)) from None
print(f"Native library: {', '.join(build.name for build in chosen) or 'none'} ({why})")  # noqa: T201
setup(
    cmdclass={"build_ext": BuildNative},
    ext_modules=[
        Extension(_name(build), [str(builds.SOURCE.relative_to(builds.FOLDER.parents[2]))]) for build in chosen
    ],
)
