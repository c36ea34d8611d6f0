"""`python -m model.bench`: the same as `flashserve bench`, where only model/ and what it needs is installed."""

from __future__ import annotations

import shlex

from model.bench import options


def main(argv: list[str], prog: str = "python -m model.bench") -> None:
    parser = options.build_parser(prog)
    chosen = options.read_options(parser, parser.parse_args(argv))
    command = shlex.join([*prog.split(), *argv])
    if chosen.profile:  # imports come after the options: torch takes seconds to load
        from model.bench.profile import profile as measure
    else:
        from model.bench.run import run as measure
    measure(chosen, command)


if __name__ == "__main__":
    options.run_program(main)
