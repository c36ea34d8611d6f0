"""Every command that a document shows is run by a test, or it is said here why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from service.media import refusal
from service.schemas.generate import GenerateRequest
from service.schemas.openai import ChatRequest, StreamOptions

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for folder in ("docker", "docs", "k8s", "loadtest", "model", "service")
    for path in (ROOT / folder).rglob("*.md")
    if "weights" not in path.parts
)
DOCUMENTS = [ROOT / "README.md", *DOCUMENTS]
PROGRAMS = (
    *("make", "flashserve", "python", "python3", ".venv/bin/python", "curl", "pip", "docker", "kubectl", "promtool"),
    *("guidellm", "aiperf", "apt-get", "git", "cp", "vllm", "locust", "prometheus"),
)

BENCH, GPU, TRAIN = "tests/model/test_bench.py", "tests/model/test_bench_gpu.py", "tests/service/test_train_command.py"
DEMO, MONITORING = "tests/model/test_demo_training.py", "tests/monitoring"
IS_WRITTEN = "test_the_committed_dashboard_is_what_the_code_writes"

# A command is known by its longest beginning in this list: the test that runs the like of it, or why none does.
RUN_BY = {
    "make": "tests/test_project.py::test_each_verb_of_the_contract_sets_up_and_then_does_its_work",
    "flashserve serve": "tests/e2e/test_generate_route.py",
    "flashserve generate": f"{BENCH}::test_generate_says_what_the_engine_says",
    "flashserve train": f"{TRAIN}::test_a_folder_of_pictures_and_clips_becomes_a_draft_that_is_served",
    "flashserve bench": f"{BENCH}::test_the_last_line_is_the_json_of_the_contract",
    "flashserve bench --drafters": f"{BENCH}::test_drafters_are_compared_on_the_same_prompts",
    "flashserve bench --profile": f"{BENCH}::test_the_parts_of_a_profiled_step_make_up_the_whole",
    "flashserve bench --service": f"{BENCH}::test_over_http_the_same_tokens_come_as_in_process",
    "python -m model.bench --drafters": f"{BENCH}::test_drafters_are_compared_on_the_same_prompts",
    "python -m model.bench --profile": f"{BENCH}::test_the_parts_of_a_profiled_step_make_up_the_whole",
    "python -m model.bench.equality": f"{BENCH}::test_an_honest_engine_passes",
    "python -m model.bench.gpu": f"{GPU}::test_a_native_target_has_no_graphs_to_measure",
    "python -m tests.model.stress": "tests/model/test_stress.py::test_a_planted_difference_is_not_explained",
    "python -m model.demo.draft": f"{DEMO}::test_a_resumed_training_goes_on_as_if_never_stopped",
    "python -m loadtest run": "tests/loadtest/test_load.py::test_one_command_writes_the_report",
    "python -m loadtest export": "tests/loadtest/test_load.py::test_pictures_and_questions_are_written_for_other_tools",
    "python -m loadtest.rolling": "tests/loadtest/test_rolling.py::test_a_rolling_restart_under_load_fails_no_request",
    "python -m loadtest.soak": "tests/e2e/test_soak.py::test_a_soak_leaves_nothing_behind",
    "python -m loadtest.livez": "tests/e2e/test_soak.py::test_livez_answers_while_16_requests_with_large_media_run",
    "python -m docker.monitoring.dashboard": f"{MONITORING}/test_dashboard.py::{IS_WRITTEN}",
    "python -m docker.monitoring.draw": f"{MONITORING}/test_real.py::test_the_picture_is_drawn_from_it",
    "curl -N http://127.0.0.1:8000/v1/generate": "tests/e2e/test_generate_route.py",
    "curl http://127.0.0.1:8000/v1/generate": "tests/e2e/test_generate_route.py",
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/service/test_openai.py",
    "curl http://127.0.0.1:8000/admin/draft": "tests/e2e/test_hot_swap.py",
    "curl http://127.0.0.1:8000/v1/models": "tests/service/test_openai.py",
    "python -m pytest": "tests/test_project.py::test_ci_checks_and_tests_as_a_person_does_and_fails_if_either_fails",
    "kubectl kustomize": "tests/k8s/test_manifests.py",
}
GONE = "a finished study that has left the tree; its result is kept"
NOT_RUN = {
    "make demo": "in full it takes a minute; its two halves are the server and the comparison, which tests run",
    "make setup TORCH=cuda": "gigabytes, for machines with a GPU",
    "flashserve serve --model Qwen": "its checkpoint must be downloaded; the family is tested with one made for it",
    "flashserve train --target Qwen": "its checkpoint must be downloaded",
    "python -m model.bench.ceiling": GONE,
    "python -m model.bench.load": GONE,
    "python -m model.bench.resume": GONE,
    "python -m model.bench.streams": GONE,
    "python -m model.bench.study": GONE,
    "python -m model.bench.table": GONE,
    "python -m model.demo.build": "hours of training",
    "python -m model.demo.evaluate": "minutes; its figures lie beside the weights",
    "docker": "needs Docker; docker/prove.py builds and runs the image without",
    "python3 docker/prove.py": "minutes, root's rights and Debian's buildah; run by hand when docker/ changes",
    "apt-get install": "changes the machine",
    "pip install": "changes the machine",
    "kubectl": "needs a cluster; what it would apply is rendered and validated by tests/k8s",
    "guidellm": "another project's tool, in an environment of its own; its output is shown",
    "aiperf": "another project's tool, in an environment of its own; its output is shown",
}
LEDGER = RUN_BY | NOT_RUN
NAMES = ("flashserve", "docker", "git", "prometheus", "make", "promtool")  # also just mentioned by name


def commands(text: str) -> Iterator[str]:
    """Of a document: in its fenced blocks, line by line, and in its text between backticks."""
    fenced = re.compile(r"^( *)```.*?\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
    for _, block in fenced.findall(text):
        for line in re.sub(r"\\\n\s*", " ", dedent(block)).splitlines():
            yield from _command(line, alone=True)
    for quoted in re.findall(r"`([^`]+)`", fenced.sub("", text)):
        yield from _command(" ".join(quoted.split()), alone=False)


def _command(line: str, *, alone: bool) -> Iterator[str]:
    words = line.removeprefix("$ ").split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables before the command
        words = words[1:]
    if not words or words[0] not in PROGRAMS or (len(words) == 1 and words[0] in NAMES):
        return
    if alone and line[:1].isspace():
        return  # what a command printed, or a list of files
    if words[0] == ".venv/bin/python":
        words[0] = "python"
    yield " ".join(words)


def entry(command: str) -> str | None:
    known = [key for key in LEDGER if command.startswith(key)]
    return max(known, key=len, default=None)


FOUND = sorted(
    {(path.relative_to(ROOT).as_posix(), command) for path in DOCUMENTS for command in commands(path.read_text())}
)


@pytest.mark.parametrize(("document", "command"), FOUND)
def test_a_documents_command_is_run_by_a_test_or_said_not_to_be(document: str, command: str) -> None:
    assert entry(command), f"{document} shows `{command}`, of which tests/test_docs.py knows nothing"


@pytest.mark.parametrize("key", LEDGER)
def test_the_ledger_has_no_command_that_no_document_shows(key: str) -> None:
    assert any(entry(command) == key for _, command in FOUND)


@pytest.mark.parametrize("test", sorted(set(RUN_BY.values())))
def test_the_tests_it_names_are_there(test: str) -> None:
    file, _, name = test.partition("::")
    assert (ROOT / file).is_file()
    assert not name or re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)


def test_commands_are_found_where_they_stand() -> None:
    block = "```\nFLASH_X=1 flashserve serve \\\n  --port 1\n   python printed\n```"
    listed = "1. Look.\n\n   ```\n   kubectl get pods\n   ```"
    found = list(commands(f"Run `make demo`, or\n\n{block}\nand `flashserve`.\n{listed}"))
    assert found == ["flashserve serve --port 1", "kubectl get pods", "make demo"]


# --- docs/api.md is whole: what the code takes and says, it names

API = (ROOT / "docs/api.md").read_text()


@pytest.mark.parametrize("name", sorted({*GenerateRequest.__struct_fields__, *ChatRequest.__struct_fields__}))
def test_the_api_reference_names_every_field(name: str) -> None:
    assert f"`{name}`" in API


def test_the_api_reference_names_every_field_of_stream_options() -> None:
    assert all(re.search(rf"[`.]{name}`", API) for name in StreamOptions.__struct_fields__)


def test_the_api_reference_names_every_error_code() -> None:
    files = [*(ROOT / "service").rglob("*.py"), *(ROOT / "model/targets").glob("*.py"), ROOT / "model/engine/engine.py"]
    said = "".join(file.read_text() for file in files)
    codes = set(re.findall(r'\b(?:default_)?code(?:: [^=\n]*)? ?= ?"(\w+)"', said))
    codes |= set(refusal._SENTENCES)
    assert len(codes) > 40
    assert sorted(code for code in codes if f"`{code}`" not in API) == []
