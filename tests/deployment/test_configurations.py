"""Every configuration file that a page shows is one that `serve` takes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from edge_vlm.cli import main
from edge_vlm_runtime.alert_sinks.evidence import EvidenceSize
from edge_vlm_runtime.alert_sinks.tables import read_sinks
from edge_vlm_runtime.cameras.config import read_plan
from edge_vlm_runtime.cli.common.config import TABLES, read_toml
from tests.deployment.dockerfile import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(text, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(), re.S), 1)
]
SECRETS = {
    "ntfy-token.txt": "Bearer tk_secret",
    "telegram-url.txt": "https://api.telegram.org/bot1:secret/sendMessage",
    "webhook-key.txt": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "key.txt": "key",
}
"""Files that the pages tell the reader to make."""


@pytest.mark.parametrize("text", BLOCKS)
def test_a_pages_file_is_taken(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    for name, secret in SECRETS.items():
        (tmp_path / name).write_text(secret)
    monkeypatch.setenv("SLACK_WEBHOOK", "https://hooks.slack.com/services/T0/B0/secret")
    file = tmp_path / "edge-vlm.toml"
    file.write_text(text)
    assert main(["serve", "--config", str(file), "--print-config"]) == 0
    assert capsys.readouterr().err == ""
    tables = {key: value for key, value in read_toml(file).items() if key in TABLES}
    cameras = {alert["camera"] for alert in tables.get("alert", [])}
    cameras -= {camera["name"] for camera in tables.get("camera", [])}
    for camera in sorted(cameras):  # of another block of the page
        tables.setdefault("camera", []).append({"name": camera, "source": "webcam"})
    read_plan(tables, file)
    for sink in read_sinks(tables.get("sink", []), file, os.environ):
        sink.open(EvidenceSize.FULL)
