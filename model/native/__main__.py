"""`python -m model.native`: which build of the native stack runs here, if any, and what to do about it if none."""

from model.native import library

SLOWER = "Models run through torch, several times slower on a CPU."


def told() -> str:
    if (found := library.load()) is not None:
        return f"The native stack: build '{found.name}'."
    if library.is_off():
        return f"No native stack: {library.CHOICE}=off. {SLOWER}"
    if "avx512f" not in library.processor_flags():
        return f"No native stack: it needs a processor with AVX512. {SLOWER}"
    return (
        "No native stack, though this processor could run one: nothing was compiled at 'make setup'. It takes a C++ "
        "compiler (Debian and Ubuntu: apt-get install g++); what that says, '.venv/bin/pip install -v --no-deps -e .' "
        f"shows. {SLOWER}"
    )


if __name__ == "__main__":
    print(told())  # noqa: T201
