from __future__ import annotations

import json
import shutil
import ssl
import stat
from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.server import tls
from edge_vlm_runtime.server.tls import Tls, own_names, self_signed

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl here")


@needs_openssl
def test_a_made_certificate_holds_the_names_and_is_used_again(tmp_path: Path) -> None:
    made = self_signed(tmp_path / "tls", ["127.0.0.1", "::1", "camera.local"])
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    found = ssl._ssl._test_decode_cert(str(made.certificate))  # type: ignore[attr-defined]
    assert ("DNS", "camera.local") in found["subjectAltName"]
    assert ("IP Address", "127.0.0.1") in found["subjectAltName"]
    before = made.certificate.read_bytes()
    again = self_signed(tmp_path / "tls", ["127.0.0.1"])  # fewer names: still good
    assert again == made and made.certificate.read_bytes() == before
    self_signed(tmp_path / "tls", ["127.0.0.1", "elsewhere.local"])
    assert made.certificate.read_bytes() != before
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == [
        *("cert.pem", "key.pem", "names.json")
    ]


@needs_openssl
def test_a_certificate_that_ends_soon_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "VALID_DAYS", 3)
    short = self_signed(tmp_path, ["127.0.0.1"]).certificate.read_bytes()
    monkeypatch.setattr(tls, "VALID_DAYS", 30)
    assert self_signed(tmp_path, ["127.0.0.1"]).certificate.read_bytes() != short


def test_without_openssl_it_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="--tls-cert"):
        self_signed(tmp_path, ["127.0.0.1"])


def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PEM"):
        Tls(tmp_path / "nothing.pem", tmp_path / "nothing.pem").check()
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.pem"):
        Tls(tmp_path / "text.pem", tmp_path / "text.pem").check()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps("not a folder"))
    with pytest.raises(ConfigError):
        self_signed(tmp_path / "file" / "tls", ["127.0.0.1"])


def test_names_of_this_machine() -> None:
    names = own_names("0.0.0.0")
    assert {"localhost", "127.0.0.1"} <= set(names)
    assert "0.0.0.0" not in names and "" not in names
    assert "camera.local" in own_names("camera.local")
