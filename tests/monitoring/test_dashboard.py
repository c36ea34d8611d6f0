"""The dashboard, the rules and the runbook agree with each other and with the service, as far as their text shows."""

from __future__ import annotations

import json
import re
import subprocess

import yaml

from docker.monitoring import dashboard
from service.metrics import LONG, PER_TOKEN, Metrics
from service.settings import Settings
from tests.monitoring.prometheus import FOLDER, JOB, RULES, alerts, groups, needs_prometheus, panel_queries, records
from tests.service.server import Server
from tests.service.test_ops import METRICS

EXPRESSIONS = [expr for _, expr in panel_queries()]
RUNBOOK = (FOLDER / "RUNBOOK.md").read_text()


def names_in(text: str) -> set[str]:
    return set(re.findall(r"(?<!:)\bflash_\w+\b", text))


def exported() -> set[str]:
    """Every name of a series that the service can have."""
    parts = {"histogram": ("_bucket", "_sum", "_count")}
    return {name + part for name, kind in METRICS.items() for part in parts.get(kind, ("",))}


def test_the_committed_dashboard_is_what_the_code_writes() -> None:
    assert (FOLDER / "dashboards/flashserve.json").read_text() == dashboard.build(), (
        "python -m docker.monitoring.dashboard"
    )


def test_every_panel_says_what_it_shows_in_which_unit() -> None:
    made = json.loads(dashboard.build())
    shown = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert len(shown) > 30
    for panel in shown:
        assert panel["title"]
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    ids = [panel["id"] for panel in made["panels"]]
    assert len(set(ids)) == len(ids)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in shown]
    assert len(set(places)) == len(places), "no panel lies on another"
    assert [variable["name"] for variable in made["templating"]["list"]] == ["datasource", "model", "instance"]


def test_the_dashboard_shows_every_metric_of_the_service() -> None:
    used = names_in(" ".join(EXPRESSIONS))
    assert used <= exported()
    unused = {name for name in METRICS if not any(one.startswith(name) for one in used)}
    assert unused == set()


def test_rules_ask_only_for_what_the_service_has_and_for_what_they_record() -> None:
    text = " ".join(rule["expr"] for rule in alerts() + records())
    assert names_in(text) <= exported()
    recorded = {rule["record"] for rule in records()}
    asked = set(re.findall(r"\bmodel:[\w:]+", " ".join(rule["expr"] for rule in alerts())))
    assert asked == recorded, "recorded for nothing, or not at all"


def test_labels_that_rules_match_are_those_of_the_service() -> None:
    """A matcher that matches nothing is no error anywhere: the alert just never fires."""
    text = Metrics("m").render().decode()
    rules = " ".join(rule["expr"] for rule in alerts() + records())
    for label in ("outcome", "reason", "le"):
        values = {value for found in re.findall(rf'\b{label}=~?"([^"]+)"', rules) for value in found.split("|")}
        assert values
        for value in values:
            assert f'{label}="{value}"' in text, f"{label}={value}"


def test_objectives_are_the_same_in_rules_dashboard_and_runbook() -> None:
    text = " ".join(rule["expr"] for rule in records())
    for name, buckets, limit in (
        ("flash_time_to_first_token_seconds", LONG, dashboard.TTFT_LIMIT),
        ("flash_time_per_output_token_seconds", PER_TOKEN, dashboard.TPOT_LIMIT),
    ):
        assert set(re.findall(rf'{name}_bucket{{le="([\d.]+)"}}', text)) == {f"{limit}"}
        assert limit in buckets, "Prometheus knows how many were slower only at the edge of a bucket"
        assert f"{limit:g} s" in RUNBOOK


def test_every_alert_says_what_to_do_and_has_its_section_in_the_runbook() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOK, re.MULTILINE)
    assert sections == list(dict.fromkeys(alert["alert"] for alert in alerts()))
    for alert in alerts():
        notes = alert["annotations"]
        assert set(notes) == {"summary", "description", "action", "runbook"}
        file, _, anchor = notes["runbook"].partition("#")
        assert (FOLDER.parent.parent / file).exists()
        assert anchor == alert["alert"].lower()
        assert alert["labels"]["severity"] in ("critical", "warning")


def test_options_and_metrics_that_the_runbook_names_exist() -> None:
    notes = " ".join(alert["annotations"]["action"] + alert["annotations"]["description"] for alert in alerts())
    options = set(re.findall(r"`?--([a-z-]+)", RUNBOOK + notes))
    assert len(options) > 5
    assert {option.replace("-", "_") for option in options} <= set(Settings.model_fields)
    assert names_in(RUNBOOK) <= exported() | set(METRICS)


def test_configuration_files_agree_on_names_and_pace() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    provisioning = FOLDER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/flashserve.yml").read_text())["providers"]
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    assert source["url"] == "http://prometheus:9090"
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    service = next(job for job in config["scrape_configs"] if job["job_name"] == JOB)
    assert service["static_configs"] == [{"targets": [f"flashserve:{Settings.model_fields['port'].default}"]}]
    jobs = set(re.findall(r'job="(\w+)"', " ".join([*EXPRESSIONS, *(rule["expr"] for rule in alerts())])))
    assert jobs == {JOB}


@needs_prometheus
def test_promtool_has_nothing_to_say_about_rules_and_configuration() -> None:
    for command in (
        ["rules", "--lint=all", "--lint-fatal", *map(str, RULES)],
        ["config", "--lint-fatal", str(FOLDER / "prometheus.yml")],
    ):
        done = subprocess.run(["promtool", "check", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert len(alerts()) + len(records()) == sum(len(group["rules"]) for path in RULES for group in groups(path))


@needs_prometheus
def test_promtool_has_nothing_to_say_about_the_metrics_page(server: Server) -> None:
    assert server.chat("one two three").status_code == 200
    assert server.chat(temperature=9).status_code == 400
    page = server.http.get("/metrics").content
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
