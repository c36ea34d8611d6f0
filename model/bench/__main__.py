"""`python -m model.bench`: the same as `flashserve bench`, where only model/ and what it needs is installed."""

from __future__ import annotations

import shlex
import sys

from model.bench import options


def main(argv: list[str], prog: str = "python -m model.bench") -> None:
    made = options.parser(prog)
    asked = options.read(made, made.parse_args(argv))
    from model.bench.run import run  # after the options: torch takes seconds to load

    run(asked, shlex.join([*prog.split(), *argv]))


if __name__ == "__main__":
    main(sys.argv[1:])
