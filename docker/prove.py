#!/usr/bin/env python3
"""Proves the image where no Docker runs: Debian's buildah builds it from the very Dockerfile; it is started and asked.

    apt-get install buildah debootstrap
    python3 docker/prove.py              as root; 5-10 minutes, 6 GB of disk while it runs

In place of python:3.11-slim-bookworm, which would have to come from a registry of images, stands a base that
debootstrap makes: the same Debian with its own Python 3.11. The container is what `docker run --read-only --tmpfs /tmp
--cap-drop ALL --security-opt no-new-privileges` makes, less limits and a network of its own (it is asked on the host's
127.0.0.1): namespaces for mounts and processes, the image's root mounted read-only, the image's user, environment and
entrypoint, which is process 1 there. Everything lies in one folder, which is removed at the end.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.client
import http.server
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEDIA = ROOT / "model" / "demo" / "media"
MIB = 1024 * 1024
START_SECONDS, ANSWER_SECONDS, DRAIN_SECONDS = 300, 300, 60

# What lets a program be built, or more be installed.
BUILD_TOOLS = ("gcc", "g++", "cc", "c++", "clang", "as", "ld", "make", "pip", "pip3")

PACKAGES = "ca-certificates,python-is-python3,python3-venv"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# As root in namespaces of its own: nothing of it is seen outside. $1: the image's root; $2: an empty folder.
MOUNTS = """
set -eu
image=$1 root=$2; shift 2
mount --bind "$image" "$root"
mount -o remount,bind,ro "$root"
mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
mount -t tmpfs -o mode=755,nosuid tmpfs "$root/dev"
for device in null zero full random urandom; do
  touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"; mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/dev/shm"
exec chroot "$root" "$@"
"""


class Proof:
    """What was claimed, whether it held, and what was seen."""

    def __init__(self) -> None:
        self.failed = 0

    def check(self, claim: str, holds: bool, seen: object) -> None:
        self.failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'}  {claim}: {seen}", flush=True)


class Builder:
    """buildah, with all that it keeps in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.driver = "overlay" if overlay_works(folder) else "vfs"
        (folder / "tmp").mkdir(exist_ok=True)
        self.env = os.environ | {"TMPDIR": str(folder / "tmp")}

    def run(self, *arguments: str | Path, log: Path | None = None) -> str:
        stores = ("--root", self.folder / "storage", "--runroot", self.folder / "run", "--storage-driver", self.driver)
        command = ["nice", "-n", "19", "buildah", *map(str, stores), *map(str, arguments)]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        if log is not None:
            log.write_text(done.stdout + done.stderr)
        if done.returncode:
            raise SystemExit(f"{shlex.join(command)}\n{(done.stdout + done.stderr)[-4000:]}")
        return done.stdout.strip()

    def build(self, image: str, *arguments: str | Path) -> float:
        """How long it took; the output is in a file beside the stores."""
        began = time.monotonic()
        log = self.folder / f"build-{image.replace(':', '-').replace('/', '-')}.log"
        options = ("--isolation", "chroot", "--network", "host", "--format", "docker", "--layers", "--tag", image)
        self.run("build", *options, *arguments, log=log)
        return time.monotonic() - began

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("inspect", "--type", "image", image))
        return found

    def layers(self, image: str) -> list[tuple[int, str]]:
        """Bytes, as unpacked, and the instruction of each, the lowest first."""
        stored = json.loads((self.folder / "storage" / f"{self.driver}-layers" / "layers.json").read_text())
        by_digest = {layer.get("diff-digest"): layer["diff-size"] for layer in stored if "diff-size" in layer}
        found = self.inspect(image)["OCIv1"]
        made_by = [step.get("created_by", "") for step in found["history"] if not step.get("empty_layer")]
        return list(zip((by_digest[digest] for digest in found["rootfs"]["diff_ids"]), made_by, strict=True))

    @contextmanager
    def mounted(self, image: str) -> Iterator[Path]:
        container = self.run("from", image)
        try:
            yield Path(self.run("mount", container))
        finally:
            self.run("umount", container)
            self.run("rm", container)


class Container:
    """A container of the image; `root` is the image's, and stays as it is."""

    def __init__(self, root: Path, config: dict[str, Any], env: dict[str, str], folder: Path) -> None:
        uid, _, gid = config["User"].partition(":")
        privileges = f"--reuid={uid} --regid={gid} --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all"
        self.as_user = ["/usr/bin/env", "-i", *config["Env"], *(f"{name}={value}" for name, value in env.items())]
        self.as_user += ["/usr/bin/setpriv", *privileges.split()]
        self.log = folder / "container.log"
        self.port = int(env["FLASH_PORT"])
        at = folder / "root"
        at.mkdir(exist_ok=True)
        unshare = ["unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
        command = [*self.as_user, *config["Entrypoint"], *config["Cmd"]]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*unshare, "sh", "-c", MOUNTS, "sh", root, at, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        wait(lambda: children.read_text().split(), 10)
        self.pid = int(children.read_text().split()[0])  # process 1 inside

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--ipc", "--uts", "--root", "--wd"]
        return subprocess.run([*enter, *self.as_user, *command], capture_output=True, text=True, check=False)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json", "Connection": "close"})
        return connection.getresponse()

    def status(self, path: str) -> int:
        """0: nobody listens."""
        try:
            return self.ask("GET", path).status
        except OSError:
            return 0

    def caption(self, kind: str, file: Path, mime: str, **fields: Any) -> http.client.HTTPResponse:
        url = f"data:{mime};base64,{base64.b64encode(file.read_bytes()).decode()}"
        parts = [
            {"type": kind, kind: {"url": url}},
            {"type": "text", "text": f"Describe the {kind.partition('_')[0]}."},
        ]
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0, **fields}
        return self.ask("POST", "/v1/chat/completions", body)

    def alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        if self.alive():
            self.process.kill()  # and with it, for --kill-child, all that is inside
        self.process.wait()


def prove_image(proof: Proof, builder: Builder, image: str) -> dict[str, Any]:
    config: dict[str, Any] = builder.inspect(image)["Docker"]["config"]
    layers = builder.layers(image)
    for size, made_by in layers:
        print(f"        {size / MIB:7.1f} MiB  {made_by[:110]}")
    print(f"        {sum(size for size, _ in layers) / MIB:7.1f} MiB  in all, unpacked")
    print(f"        {json.dumps(config.get('Labels'))}")
    uid = config["User"].partition(":")[0]
    proof.check("the user is a number, and not root's", uid.isdecimal() and uid != "0", config["User"])
    with builder.mounted(image) as root:
        found = sorted(str(path.relative_to(root)) for path in programs(root) if path.name in BUILD_TOOLS)
        proof.check("no compiler, no pip", not found, ", ".join(found) or "none found")
        site = next(root.glob("opt/flashserve/lib/python3*/site-packages"))
        native = sorted(path.name for path in site.glob("model/backends/native/*.so"))
        proof.check("every build of the native library is there", len(native) == 4, ", ".join(native))
        names = {path.name for path in (*site.iterdir(), *root.iterdir(), *(root / "opt").iterdir())}
        strays = names & {"docker", "k8s", "loadtest", "tests", "runs", ".git", ".venv", "pytest", "ruff", "mypy"}
        proof.check("nothing but the package and what it needs", not strays, ", ".join(sorted(strays)) or "no strays")
        left = sorted(path.name for path in (root / "opt").iterdir())
        proof.check("nothing of this machine", left == ["flashserve"] and not (root / "etc/pip.conf").exists(), left)
    return config


def prove_running(proof: Proof, container: Container, config: dict[str, Any]) -> None:
    health = config["Healthcheck"]["Test"][1:]
    began = time.monotonic()
    wait(lambda: container.status("/livez") == 200 or not container.alive(), START_SECONDS)
    loading = container.status("/readyz"), container.execute(*health).returncode
    wait(lambda: container.status("/readyz") == 200 or not container.alive(), START_SECONDS)
    if not container.alive():
        raise SystemExit(f"the container ended:\n{container.log.read_text()[-4000:]}")
    print(f"        ready after {time.monotonic() - began:.1f} s")
    proof.check("while it loads, /readyz and the health check say no", loading == (503, 1), loading)
    done = container.execute(*health)
    proof.check("once loaded, /readyz and the health check say yes", done.returncode == 0, done.stderr or "200, 0")

    names = ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs")
    status = dict(line.split(":\t") for line in Path(f"/proc/{container.pid}/status").read_text().splitlines())
    seen = {name: status[name].split()[0] for name in names}
    uid, gid = config["User"].split(":")
    expected = dict(zip(names, (uid, gid, "0" * 16, "0" * 16, "1"), strict=True))
    proof.check("process 1 runs as that user, without privileges", seen == expected, seen)
    who = container.execute("id")
    proof.check("id", who.stdout.startswith(f"uid={uid}("), who.stdout.strip())
    for folder in ("/", "/opt/flashserve/bin", "/cache", "/etc"):
        done = container.execute("touch", f"{folder}/probe")
        proof.check(f"{folder} cannot be written to", "Read-only file system" in done.stderr, done.stderr.strip())
    done = container.execute("touch", "/tmp/probe")
    proof.check("/tmp can", done.returncode == 0, "touch /tmp/probe")
    done = container.execute("python", "-m", "model.backends.native")
    used = (done.stdout or done.stderr).partition("\n")[0]
    best = "the best that this processor runs" in used or "runs none of its builds" in used
    proof.check("of the native library the best build is used", best, used)

    for kind, name, mime, words in (
        ("image_url", "scene.png", "image/png", ("five objects", "black background", "crescent")),
        ("video_url", "clip.mp4", "video/mp4", ("three objects", "white background", "collides")),
    ):
        began = time.monotonic()
        response = container.caption(kind, MEDIA / name, mime)
        answer = json.loads(response.read())
        took = time.monotonic() - began
        if response.status != 200:
            proof.check(f"{name} is described", False, answer)
            continue
        text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
        proof.check(f"{name} is described", all(word in text for word in words), f"{took:.2f} s\n        {text}")
        drafted = usage["completion_tokens_details"]["accepted_prediction_tokens"]
        proof.check("most of it was drafted", drafted > usage["completion_tokens"] / 2, usage)
    page = container.ask("GET", "/")
    proof.check("the page at / is there", page.status == 200 and b"<html" in page.read(), page.status)


def prove_drain(proof: Proof, container: Container) -> None:
    """SIGTERM amid eight streams of some 1500 tokens each."""
    streams: list[bytes] = []

    def read_stream() -> None:
        fields = {"stream": True, "n": 2, "max_tokens": 1500, "ignore_eos": True, "speculation": "off"}
        streams.append(container.caption("image_url", MEDIA / "scene.png", "image/png", **fields).read())

    readers = [threading.Thread(target=read_stream) for _ in range(4)]
    for reader in readers:
        reader.start()
    wait(lambda: running(container) == 8, 60)
    began = time.monotonic()
    os.kill(container.pid, signal.SIGTERM)
    time.sleep(0.2)
    during = container.status("/readyz"), container.status("/livez"), running(container)
    try:
        code: int | str = container.process.wait(DRAIN_SECONDS)
    except subprocess.TimeoutExpired:
        code = "it did not end"
        container.kill()
    took = time.monotonic() - began
    for reader in readers:
        reader.join(DRAIN_SECONDS)
    proof.check("after SIGTERM it is alive but not ready, and streams go on", during == (503, 200, 8), during)
    ends = [
        stream.endswith(b"data: [DONE]\n\n") and stream.count(b'"finish_reason":"length"') == 2 for stream in streams
    ]
    proof.check("each stream came to its end", ends == [True] * 4, f"{sum(map(len, streams))} bytes")
    proof.check("and the exit code is 0", code == 0, f"{code}, {took:.1f} s after SIGTERM")


def running(container: Container) -> int:
    """Generations that the engine is working on."""
    lines = container.ask("GET", "/metrics").read().decode().splitlines()
    return round(sum(float(line.split()[-1]) for line in lines if line.startswith("flash_requests_running{")))


def programs(root: Path) -> Iterator[Path]:
    for folder in ("bin", "usr/bin", "usr/local/bin", "usr/sbin", "opt/flashserve/bin", "tools/bin"):
        yield from (root / folder).glob("*")


def make_base(builder: Builder, mirror: str) -> str:
    folder, image = builder.folder / "base", "localhost/base"
    command = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(folder), mirror]
    with (builder.folder / "debootstrap.log").open("wb") as log:
        if subprocess.run(["nice", "-n", "19", *command], stdout=log, stderr=log, check=False).returncode:
            raise SystemExit(f"debootstrap failed; see {log.name}")
    (folder / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")  # engines give one to each container
    for pattern in ("var/cache/apt/archives/*.deb", "var/cache/apt/*.bin", "var/lib/apt/lists/*_*"):
        for path in folder.glob(pattern):
            path.unlink()
    container = builder.run("from", "scratch")
    builder.run("copy", container, folder, "/")
    builder.run("config", "--env", f"PATH={PATH}", "--cmd", "python", "--created-by", "debootstrap", container)
    builder.run("commit", "--format", "docker", "--rm", container, image)
    shutil.rmtree(folder)
    return image


def lend_pip_settings(folder: Path) -> list[str | Path]:
    """Options of a build that lend it where this machine's pip finds packages."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    settings: dict[str, str] = {}
    for line in listed.stdout.splitlines():  # section.name='value'; the last said counts least
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2].removeprefix("default-")
        if name in {"index-url", "extra-index-url", "find-links", "trusted-host", "cert", "timeout", "proxy"}:
            settings.setdefault(name, value.strip("'\""))
    if not settings:
        return []
    options: list[str | Path] = []
    if "cert" in settings:
        options = ["--volume", f"{settings['cert']}:{settings['cert']}:ro"]
    for name in {"index-url", "extra-index-url", "find-links"} & settings.keys():
        settings[name] = " ".join(served(word) for word in settings[name].split())
    pip_conf = folder / "pip.conf"
    pip_conf.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    return [*options, "--secret", f"id=pip.conf,src={pip_conf}"]


def served(place: str) -> str:
    """A folder of this machine as an address on 127.0.0.1: mounted, it would leave its mount point in the image."""
    path = Path(place.removeprefix("file://"))
    if not (path.is_absolute() and path.is_dir()):
        return place
    top = path.parent if place.startswith("file://") else path  # an index points to files beside it
    handler = functools.partial(QuietHandler, directory=str(top))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/{path.relative_to(top)}/"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def overlay_works(folder: Path) -> bool:
    """Where it does not, every layer is stored as a full copy."""
    parts = [folder / "try" / name for name in ("lower", "upper", "work", "merged")]
    for part in parts:
        part.mkdir(parents=True)
    options = "lowerdir={},upperdir={},workdir={}".format(*parts)
    mount = ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, str(parts[3])]
    works = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    shutil.rmtree(folder / "try")
    return works


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait(condition: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds} s in vain")
        time.sleep(0.05)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Build the image with buildah, run it, and check what it promises.")
    parser.add_argument("--base", help="an image to build on that buildah can pull; by default one made by debootstrap")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap finds Debian")
    parser.add_argument("--torch-index", help="TORCH_CPU_INDEX of the Dockerfile; empty: wherever pip finds the rest")
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="build the cuda target too (with PyPI's torch: gigabytes); it is not started",
    )
    parser.add_argument("--folder", type=Path, help="where to work; it is kept. By default a temporary one that is not")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if os.geteuid() != 0:
        raise SystemExit("needs root: debootstrap, mounts and namespaces")
    if missing := [tool for tool in ("buildah", "debootstrap", "unshare", "nsenter") if shutil.which(tool) is None]:
        raise SystemExit(f"not installed: {', '.join(missing)} (apt-get install buildah debootstrap util-linux)")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="flashserve-proof-", dir="/var/tmp"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return prove(options, folder)
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


def prove(options: argparse.Namespace, folder: Path) -> int:
    proof, builder = Proof(), Builder(folder)
    print(f"        {builder.run('--version')}, storage: {builder.driver}")
    began = time.monotonic()
    base = options.base or make_base(builder, options.mirror)
    print(f"        the base: {base}, {time.monotonic() - began:.0f} s")
    shared = ["--build-arg", f"BASE={base}", "--file", ROOT / "docker" / "Dockerfile", *lend_pip_settings(folder)]
    torch = [] if options.torch_index is None else ["--build-arg", f"TORCH_CPU_INDEX={options.torch_index}"]

    image = "localhost/flashserve:cpu"
    print(f"        {image}: built in {builder.build(image, *shared, *torch, ROOT):.0f} s")
    config = prove_image(proof, builder, image)
    with builder.mounted(image) as root:
        env = {"FLASH_HOST": "127.0.0.1", "FLASH_PORT": str(free_port())}
        container = Container(root, config, env, folder)
        try:
            prove_running(proof, container, config)
            prove_drain(proof, container)
        finally:
            container.kill()

    if options.cuda:
        image = "localhost/flashserve:cuda"
        print(f"        {image}: built in {builder.build(image, '--target', 'cuda', *shared, ROOT):.0f} s")
        with builder.mounted(image) as root:
            version = next(root.glob("opt/flashserve/lib/python3*/site-packages/torch-*.dist-info")).name
            print(f"        its torch: {version}; it is not started: that takes a GPU")
    print(f"{proof.failed} claims failed" if proof.failed else "all claims hold")
    return 1 if proof.failed else 0


if __name__ == "__main__":
    sys.exit(main())
