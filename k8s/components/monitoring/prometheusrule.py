"""Writes prometheusrule.yaml: the rules of docker/monitoring/rules/ as the Prometheus Operator wants them.

    python k8s/components/monitoring/prometheusrule.py

Run it when the rules change. Kustomize cannot do this: it puts files into ConfigMaps, not into the spec of an object.
"""

from __future__ import annotations

from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
RULES = HERE.parent.parent.parent / "docker" / "monitoring" / "rules"
WRITTEN = HERE / "prometheusrule.yaml"


class Readable(yaml.SafeDumper):
    """Expressions over several lines stay as they were written."""


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def prometheusrule() -> str:
    groups = [group for file in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]]
    thing = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        # Prometheus picks PrometheusRules by label; kube-prometheus-stack wants `release` here.
        "metadata": {
            "name": "flashserve",
            "namespace": "flashserve",
            "labels": {"app.kubernetes.io/name": "flashserve"},
        },
        "spec": {"groups": groups},
    }
    text = yaml.dump(thing, Dumper=Readable, sort_keys=False, width=120)
    return f"# Written by {Path(__file__).name} from docker/monitoring/rules/.\n{text}"


if __name__ == "__main__":
    WRITTEN.write_text(prometheusrule())
