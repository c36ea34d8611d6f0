"""`python -m model.backends.native`: Say which native build runs here and why, or what to do where none does."""

import sys

from model.backends.native import library
from model.backends.native.builds import BUILDS, INSTALL, SLOWER, Build, compiler
from model.backends.native.builds import CHOICE as COMPILED
from model.errors import ConfigError


def report() -> str:
    """Say which build is used, and of each why it is or is not. Raises ConfigError where `library.load` does."""
    used = library.load()
    runnable = [build for build in BUILDS if not library.lacking_features(build)]
    if used is not None:
        first = f"The native library: {used.name}, {_why(used.name, runnable[0])}."
    elif library.is_off():
        first = f"No native library: {library.CHOICE}=off. {SLOWER}"
    elif not runnable:
        first = f"No native library: this processor runs none of its builds. {SLOWER}"
    elif any(build.path.exists() for build in runnable):
        first = f"No native library: the system does not let this process use what is compiled. {SLOWER}"
    elif not compiler():
        first = f"No native library: none is compiled, and there is no C++ compiler {INSTALL}. {SLOWER}"
    else:
        first = f"No native library: none is compiled; '{COMPILED}=auto make setup' does that. {SLOWER}"
    return "\n".join([first, *(f"  {build.name:<12}{_state(build)}" for build in BUILDS)])


def _why(name: str, best: Build) -> str:
    if library.is_chosen():
        return f"as {library.CHOICE} says"
    if name == best.name:
        return "the best that this processor runs"
    if best.path.exists():
        return f"as the system does not let this process use {best.name}"
    return f"the best that is compiled; '{COMPILED}={best.name} make setup' compiles a better one"


def _state(build: Build) -> str:
    compiled = "compiled" if build.path.exists() else "not compiled"
    if lacking := library.lacking_features(build):
        return f"{compiled}; this processor lacks {', '.join(lacking)}"
    return f"{compiled}; this processor runs it"


if __name__ == "__main__":
    try:
        print(report())  # noqa: T201
    except ConfigError as error:
        sys.exit(str(error))
