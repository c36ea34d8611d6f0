"""`python -m model.native`: which build of the native stack runs here, if any."""

from model.native import library

found = library.load()
print(  # noqa: T201
    f"The native stack: build '{found.name}'."
    if found
    else "No native stack: models run through torch, several times slower on a CPU. It needs x86-64 with AVX512, "
    "and a C++ compiler at 'make setup' (Debian and Ubuntu: apt-get install g++)."
)
