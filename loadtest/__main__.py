"""Load a service and report what it held."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from loadtest import measure, report
from loadtest.figures import Objectives, Trust
from loadtest.measure import Options
from loadtest.scenarios import SCENARIOS, Scenario, draw
from loadtest.service import Ending, service

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

MAX_USERS = 10_000
ABOUT = "; ".join(f"{name}: {scenario.about}" for name, scenario in SCENARIOS.items())


def _users(value: str) -> tuple[int, ...]:
    numbers = [part.strip() for part in value.split(",")]
    if not all(number.isdecimal() and 1 <= int(number) <= MAX_USERS for number in numbers):
        raise typer.BadParameter(f"{value!r} is no list of numbers from 1 to {MAX_USERS}, such as 1,4,16")
    return tuple(map(int, numbers))


def _speculation(value: str) -> tuple[measure.Speculation, ...]:
    ways: dict[str, measure.Speculation] = {"off": "off", "on": "auto"}
    names = [part.strip() for part in value.split(",")]
    if not set(names) <= set(ways):
        raise typer.BadParameter(f"{value!r} is none of off, on and off,on")
    return tuple(ways[name] for name in names)


def _scenario(value: str) -> str:
    if value not in SCENARIOS:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(SCENARIOS)}")
    return value


@app.command()
def run(
    url: Annotated[
        str | None, typer.Option(help="Base URL of a service that runs already; without it, one is started.")
    ] = None,
    scenario: Annotated[str, typer.Option(callback=_scenario, help=f"What is sent. {ABOUT}.")] = "mixed",
    users: Annotated[str, typer.Option(help="Users at once, one run after the other.")] = "1,4,16,64",
    duration: Annotated[float, typer.Option(min=1, max=86_400, help="Seconds that each run is measured.")] = 30.0,
    warm_up: Annotated[float, typer.Option(min=0, max=600, help="Seconds of load before that.")] = 3.0,
    speculation: Annotated[str, typer.Option(help="off,on: both, by turns; or one of them.")] = "off,on",
    ttft: Annotated[float, typer.Option(min=0, help="Objective: seconds to the first token.")] = 1.0,
    time_per_token: Annotated[float, typer.Option(min=0, help="Objective: seconds per further token.")] = 0.05,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    stock: Annotated[int, typer.Option(min=1, max=10_000, help="Different requests; then from the start again.")] = 128,
    seed: Annotated[int, typer.Option(min=0, help="Of what is asked.")] = 0,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for one request.")] = 120.0,
    max_requests: Annotated[int, typer.Option(min=1, max=1_000_000, help="Of one run.")] = 20_000,
    new_connections: Annotated[bool, typer.Option(help="A connection for each request.")] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help="Where /metrics is, once for each replica; by default below --url."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The `model` of the requests, where the service wants one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="LOADTEST_API_KEY", help="The service's key.", show_envvar=True)
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/loadtest"),
    machine: Annotated[str | None, typer.Option(help="How the report names the machine.")] = None,
    max_failed: Annotated[float, typer.Option(min=0, max=1, help="Share of failed requests; above, exit 1.")] = 0.0,
    min_in_time: Annotated[float, typer.Option(min=0, max=1, help="Share within the objectives; below, exit 1.")] = 0.0,
    max_generator_cpu: Annotated[
        float, typer.Option(min=0, help="Share of a core above which the generator casts doubt on a run.")
    ] = Trust.cpu_share,
    max_generator_lag: Annotated[
        float, typer.Option(min=0, help="The same for its loop's lag (p95), as a share of the median TTFT.")
    ] = Trust.lag,
) -> None:
    """Load a service with more and more users, without speculation and with it; write report.json, .txt and .html.

    Without --url a service is started with the FLASH_* variables that are set, but without a cache of media features
    (FLASH_ENCODER_CACHE_BYTES=0), since requests repeat after --stock. The exit code is 1 where a limit was broken.
    """
    options = Options(
        scenario=scenario,
        users=_users(users),
        duration=duration,
        warm_up=warm_up,
        speculation=_speculation(speculation),
        objectives=Objectives(ttft, time_per_token),
        trust=Trust(cpu_share=max_generator_cpu, lag=max_generator_lag),
        max_tokens=max_tokens,
        stock=stock,
        seed=seed,
        timeout=timeout,
        max_requests=max_requests,
        keep_alive=not new_connections,
        api_key=api_key,
        model=model,
    )
    result: dict[str, Any] = {
        "machine": {
            "name": machine or f"{os.cpu_count()} CPUs, {platform.platform()}",
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        },
        "command": shlex.join(["python", "-m", "loadtest", *_without_key(sys.argv[1:])]),
        "taken_at": datetime.now(UTC).isoformat(timespec="minutes"),
        "options": measure.as_json(options),
        "runs": [],
    }
    os.environ.setdefault("FLASH_ENCODER_CACHE_BYTES", "0")
    with service(url, Ending()) as address:
        for found in measure.run(address, options, metrics or ()):
            result["runs"].append(found)
            report.write_json(result, output)  # after each: an interrupted test leaves what it has
            print(_line(found), file=sys.stderr, flush=True)
    print(report.text(result))
    print(f"Written to {output}/: report.html, report.json, report.txt, by-users.png")
    result["ok"] = not (broken := _broken(result["runs"], max_failed, min_in_time))
    for complaint in broken:
        print(f"FAILED  {complaint}")
    report.write(result, output)
    print(json.dumps({"ok": result["ok"], "command": result["command"], "report": str(output / "report.json")}))
    raise typer.Exit(0 if result["ok"] else 1)


@app.command("report")
def render(
    source: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A report.json.")],
    output: Annotated[Path, typer.Option(help="Folder of the report.")],
) -> None:
    """Write a report again, from its JSON."""
    report.write(json.loads(source.read_text()), output)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where to; it is made if need be.")],
    number: Annotated[int, typer.Option(min=1, max=10_000, help="Of pictures, each with a question.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write pictures and questions about them as files for other load tools: guidellm.jsonl and aiperf.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"guidellm": [], "aiperf": []}
    stock = draw(Scenario("", {"image": 1}), number, seed=seed, max_tokens=128)
    for index, (_, question) in enumerate(stock):
        picture = folder.absolute() / f"{index}.png"
        picture.write_bytes(question.files[0].data)
        lines["guidellm"].append(json.dumps({"prompt": question.prompt, "image": str(picture)}))
        lines["aiperf"].append(json.dumps({"text": question.prompt, "image": str(picture)}))
    for tool, each in lines.items():
        (folder / f"{tool}.jsonl").write_text("\n".join(each) + "\n")


def _broken(runs: list[dict[str, Any]], max_failed: float, min_in_time: float) -> list[str]:
    found = []
    for one in runs:
        client, name = one["client"], f"{one['users']} users, speculation {report.NAMES[one['speculation']]}"
        failed = sum(client["failures"].values())
        if failed > max_failed * client["sent"]:
            found.append(f"{name}: {failed} of {client['sent']} requests failed")
        if not client["answered"]:
            found.append(f"{name}: no request was answered")
        elif client["goodput_share"] < min_in_time:
            found.append(f"{name}: {client['goodput_share']:.0%} of the requests were answered in time")
    return found


def _line(found: dict[str, Any]) -> str:
    table = report.cells(report.CLIENT, [found])
    return ", ".join(f"{title} {cell}" for title, cell in zip(*table, strict=True) if title in SHOWN)


SHOWN = ("users", "speculation", "tokens/s", "goodput/s", "TTFT p50 s", "token p50 ms", "failed")


def _without_key(arguments: list[str]) -> list[str]:
    """The command as it can be shown to anybody."""
    shown: list[str] = []
    for argument in arguments:
        if shown and shown[-1] == "--api-key":
            shown.append("...")
        else:
            shown.append("--api-key=..." if argument.startswith("--api-key=") else argument)
    return shown


if __name__ == "__main__":
    app(prog_name="python -m loadtest")
