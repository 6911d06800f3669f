"""The page's modules: their sizes, what they may load, and those that run without a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_vlm_runtime.server.page import DEMO_CLIP, WEB, network_names, page_facts

NODE = shutil.which("node")
LEAST_NODE = (20, 19)
"""That loads modules from files that no package.json describes."""
MAX_LINES = 250
MARKUP = (
    r"(inner|outer|insertAdjacent)HTML|document\.write|createContextualFragment|DOMParser|srcdoc"
)


def test_no_module_is_long_and_none_loads_anything_from_elsewhere() -> None:
    files = [file for file in WEB.rglob("*") if file.suffix in (".js", ".css", ".html")]
    assert len(files) > 20
    for file in files:
        content = file.read_text(encoding="utf-8")
        assert file.suffix == ".css" or content.count("\n") <= MAX_LINES, file
        addresses = set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[^\s\"']*", content))
        assert addresses <= {"http://www.w3.org/2000/svg"}, file
        # The page's policy (CSP) allows neither.
        assert not re.search(r"<script>|\son\w+=|\sstyle=|\beval\(", content), file
        # Answers and names are somebody else's words: they are shown as text, never as markup.
        assert not re.search(MARKUP, content), file


@pytest.mark.skipif(NODE is None, reason="no node on this machine")
def test_modules_that_need_no_browser() -> None:
    version = subprocess.run(
        [str(NODE), "--version"], capture_output=True, text=True, timeout=60, check=True
    ).stdout.strip()
    if tuple(map(int, version.lstrip("v").split(".")[:2])) < LEAST_NODE:
        pytest.skip(f"node {version} is older than {LEAST_NODE}")
    script = Path(__file__).with_name("page_modules.test.mjs")
    done = subprocess.run(
        [str(NODE), "--test", str(script)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_other_devices_are_told() -> None:
    facts = page_facts("192.0.2.7", 8765, is_tls=True, api_key="a key/+")
    (address,) = facts["addresses"]
    assert address["url"] == "https://192.0.2.7:8765/"  # without the key: it is shown
    assert address["qr"].startswith("data:image/svg+xml")
    assert "http://" not in address["qr"].replace("http://www.w3.org", "")
    other = page_facts("192.0.2.7", 8765, is_tls=True, api_key=None)
    assert other["addresses"][0]["qr"] != address["qr"]  # that has the key in it
    assert facts["has_key"]
    assert facts["is_reachable"]
    assert page_facts("127.0.0.1", 1, is_tls=False, api_key=None)["addresses"] == []
    assert network_names("::1") == network_names("some-name") == []
    assert network_names("2001:db8::1") == ["2001:db8::1"]
    assert DEMO_CLIP.is_file()
