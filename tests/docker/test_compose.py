"""Claims about docker/compose.yaml: that Docker would take it, and that it agrees with the image, the settings and what
it mounts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from service.server import CLOSE_TIMEOUT
from service.settings import Settings
from tests.docker.image import ROOT, last, stages

FOLDER = ROOT / "docker"


def filled_in(value: Any) -> Any:
    """As compose fills in variables that are not set."""
    if isinstance(value, dict):
        return {key: filled_in(part) for key, part in value.items()}
    if isinstance(value, list):
        return [filled_in(part) for part in value]
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", value) if isinstance(value, str) else value


COMPOSE: dict[str, Any] = filled_in(yaml.safe_load((FOLDER / "compose.yaml").read_text()))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
EVERY = pytest.mark.parametrize("name", SERVICES)


def test_it_is_what_the_compose_specification_allows():
    known = {key: value for key, value in COMPOSE.items() if not key.startswith("x-")}
    compose_spec.PyCompose.from_json(json.dumps(known)).validate()


@EVERY
def test_every_container_is_confined(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "cap_add" not in service


@EVERY
def test_every_port_is_this_machines_own(name):
    for port in SERVICES[name]["ports"]:
        assert port.startswith("127.0.0.1:"), port


@EVERY
def test_every_container_has_a_health_check_and_a_version(name):
    """Ours has the image's check."""
    service = SERVICES[name]
    if name not in OURS:
        assert "healthcheck" in service
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]


@EVERY
def test_every_file_it_mounts_is_there(name):
    for mount in SERVICES[name]["volumes"]:
        source, _, target = mount.partition(":")
        if source.startswith("."):
            assert (FOLDER / source).exists(), source
            assert target.endswith(":ro"), mount
        else:
            assert source in COMPOSE["volumes"], source


@pytest.mark.parametrize("name", OURS)
def test_ours_agrees_with_the_dockerfile_and_the_settings(name):
    service = OURS[name]
    build = service["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).exists()
    assert build["target"] in stages()
    assert service["ports"] == [f"127.0.0.1:8000:{last(build['target'], 'EXPOSE')}"]
    values: dict[str, Any] = {
        key.removeprefix("FLASH_").lower(): value
        for key, value in service["environment"].items()
        if value  # an empty variable is none
    }
    settings = Settings(**values)
    assert settings.api_key == ()
    grace = float(service["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_timeout + CLOSE_TIMEOUT + 5


def test_the_gpu_takes_the_cpus_place():
    gpu = SERVICES["flashserve-gpu"]
    assert gpu["profiles"] == ["gpu"]
    assert gpu["build"]["target"] == "cuda"
    assert gpu["networks"]["default"]["aliases"] == ["flashserve"]
    assert gpu["ports"] == SERVICES["flashserve"]["ports"]


def test_prometheus_asks_the_service_where_it_listens():
    config = yaml.safe_load((FOLDER / "monitoring" / "prometheus.yml").read_text())
    targets = {
        target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]
    }
    assert f"flashserve:{last('cpu', 'EXPOSE')}" in targets
    mounted = [mount.split(":")[:2] for mount in SERVICES["prometheus"]["volumes"] if mount.startswith(".")]
    found = [
        path
        for pattern in config["rule_files"]
        for source, _ in mounted
        for path in (FOLDER / source).parent.glob(pattern)
    ]
    assert found, config["rule_files"]


def test_grafana_finds_its_data_source_and_its_dashboard():
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"] if mount.startswith("."))
    inside = {target: FOLDER / source for source, target in mounts.items()}

    def provisioned(kind: str) -> list[dict[str, Any]]:
        files = inside[f"/etc/grafana/provisioning/{kind}"].glob("*.y*ml")
        return [
            entry
            for file in files
            for entry in yaml.safe_load(file.read_text())[{"dashboards": "providers"}.get(kind, kind)]
        ]

    (source,) = provisioned("datasources")
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert SERVICES[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    (provider,) = provisioned("dashboards")
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (inside[provider["options"]["path"]] / home.name).exists()


def test_the_readme_names_settings_that_exist():
    named = set(re.findall(r"FLASH_[A-Z_]+", (FOLDER / "README.md").read_text()))
    assert named <= {f"FLASH_{name.upper()}" for name in Settings.model_fields}
