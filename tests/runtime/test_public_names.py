"""What `edge_vlm_runtime` offers by name, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import edge_vlm_runtime
from edge_vlm_runtime.client.client import Client, connect
from edge_vlm_runtime.client.sync import SyncClient
from edge_vlm_runtime.engine_thread.in_process import InProcessSession
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.typed import Settings
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.session import Session
from tests.tiny import ROOT


def test_the_public_names_are_those_of_their_rooms() -> None:
    assert edge_vlm_runtime.Client is Client
    assert edge_vlm_runtime.LoadedBundle is LoadedBundle
    assert edge_vlm_runtime.Server is Server
    assert edge_vlm_runtime.Session is Session
    assert edge_vlm_runtime.connect is connect
    assert edge_vlm_runtime.SyncClient is SyncClient
    assert edge_vlm_runtime.InProcessSession is InProcessSession
    assert edge_vlm_runtime.Settings is Settings
    assert set(edge_vlm_runtime.__all__) <= set(dir(edge_vlm_runtime))
    with pytest.raises(AttributeError, match="no attribute 'Sessions'"):
        _ = edge_vlm_runtime.Sessions  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_else() -> None:
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'runtime')!r}]; "
        "before = set(sys.modules); import edge_vlm_runtime; "
        "print(sorted(m.partition('.')[0] for m in set(sys.modules) - before "
        "if m.partition('.')[0] not in sys.stdlib_module_names))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "['edge_vlm_runtime']"
