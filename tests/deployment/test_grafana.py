"""The dashboard, the scrape configuration and the rules name what a server gives."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cameras.keeper import CameraFile
from edge_vlm_runtime.demo.paths import DEMO_FOLDER
from edge_vlm_runtime.server.app import Server
from tests.deployment.dockerfile import ROOT
from tests.runtime.alerts.receivers import wait_until
from tests.tiny import tiny_bundle

DASHBOARD = ROOT / "deploy" / "grafana-dashboard.json"
RULES = ROOT / "deploy" / "prometheus-rules.yml"
SCRAPE = ROOT / "deploy" / "prometheus.yml"
OF_SOME_MACHINES = {
    "edge_vlm_gpu_power_watts": {"gpu"},
    "edge_vlm_gpu_memory_used_bytes": {"gpu"},
    "edge_vlm_rail_power_watts": {"rail"},
}
"""Of NVML and the INA3221; tests/runtime/machine/test_gauges.py has stand-ins for those."""
NAME = re.compile(r"\bedge_vlm_\w+")


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
    return [*found, *(rule["expr"] for rule in rules)]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of a server with a camera whose alert has begun."""
    rule = {"question": "is there a red ball ?", "on_threshold": 1e-9, "off_threshold": 0.0}
    tables = {
        "camera": [{"name": "door", "source": str(DEMO_FOLDER / "clip.mp4")}],
        "alert": [{"name": "ball", "camera": "door", **rule}],
    }
    plan = read_plan(tables, Path("edge-vlm.toml"))
    with Server.open(tiny_bundle(), threads=1, cameras=CameraFile(plan=plan)) as server:
        server.start()
        pages: list[str] = []

        def has_begun() -> bool:
            with urllib.request.urlopen(f"{server.page_url}metrics", timeout=60) as answer:
                pages.append(answer.read().decode())
            return "edge_vlm_camera_alerts_total{" in pages[-1]

        wait_until(has_begun)
        return pages[-1]


def test_every_metric_of_dashboard_and_rules_there_is(metrics: str) -> None:
    given = set()
    for family in text_string_to_metric_families(metrics):
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        given |= {f"{family.name}{end}" for end in ends.get(family.type, [""])}
    wanted = {name for text in expressions() for name in NAME.findall(text)}
    assert len(wanted) > 20
    assert wanted - given == OF_SOME_MACHINES.keys()
    source = (ROOT / "runtime/edge_vlm_runtime/server/metrics.py").read_text()
    for name in OF_SOME_MACHINES:
        assert name.removeprefix("edge_vlm_") in source


def test_labels_and_variables_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(dashboard)))
    assert used == variables
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    boxes: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        box: dict[str, Any] = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(box["x"], box["x"] + box["w"])
            for y in range(box["y"], box["y"] + box["h"])
        }
        assert not cells & boxes
        assert max(x for x, _ in cells) < 24
        boxes |= cells


def test_the_page_shows_the_scrape_configuration_that_is_there() -> None:
    shown = (ROOT / "docs" / "grafana.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert shown in SCRAPE.read_text()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (apt: prometheus)")
def test_prometheus_takes_configuration_rules_and_expressions(tmp_path: Path) -> None:
    for file in (SCRAPE, RULES):
        shutil.copy(file, tmp_path)
    (tmp_path / "edge-vlm-key.txt").write_text("key")
    panels = [
        {"record": f"panel_{number}", "expr": text} for number, text in enumerate(expressions())
    ]
    filled = json.dumps({"groups": [{"name": "panels", "rules": panels}]})
    filled = filled.replace("$__rate_interval", "1m")
    (tmp_path / "panels.json").write_text(filled)
    for what, name in (("config", SCRAPE.name), ("rules", "panels.json")):
        ran = subprocess.run(
            ["promtool", "check", what, name], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
