"""`python -m model.bench`: the same as `flashserve bench`, where only model/ and what it needs is installed."""

from __future__ import annotations

import shlex

from model.bench import options


def main(argv: list[str], prog: str = "python -m model.bench") -> None:
    made = options.parser(prog)
    asked = options.read(made, made.parse_args(argv))
    command = shlex.join([*prog.split(), *argv])
    if asked.profile:  # imports come after the options: torch takes seconds to load
        from model.bench.profile import profile

        profile(asked, command)
    else:
        from model.bench.run import run

        run(asked, command)


if __name__ == "__main__":
    options.program(main)
