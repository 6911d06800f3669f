from __future__ import annotations

import os
import shutil
import ssl
import stat
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm_runtime.server.access import tls
from edge_vlm_runtime.server.access.tls import Tls, own_names, self_signed


def alternatives(made: Tls) -> set[str]:
    made.check()
    found = ssl._ssl._test_decode_cert(str(made.certificate))  # type: ignore[attr-defined]
    return {name for _, name in found["subjectAltName"]}


def test_a_made_certificate_holds_the_names_and_is_used_again(tmp_path: Path) -> None:
    made = self_signed(tmp_path / "tls", ["127.0.0.1", "::1", "camera.local"])
    assert stat.S_IMODE(made.key.stat().st_mode) == 0o600
    found = ssl._ssl._test_decode_cert(str(made.certificate))  # type: ignore[attr-defined]
    assert ("DNS", "camera.local") in found["subjectAltName"]
    assert ("IP Address", "127.0.0.1") in found["subjectAltName"]
    before = made.certificate.read_bytes()
    again = self_signed(tmp_path / "tls", ["127.0.0.1"])  # fewer names: still good
    assert again == made
    assert made.certificate.read_bytes() == before
    self_signed(tmp_path / "tls", ["127.0.0.1", "elsewhere.local"])
    assert made.certificate.read_bytes() != before
    assert sorted(path.name for path in (tmp_path / "tls").iterdir()) == ["cert.pem", "key.pem"]


def test_a_certificate_that_ends_soon_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "VALID_DAYS", 3)
    short = self_signed(tmp_path, ["127.0.0.1"]).certificate.read_bytes()
    monkeypatch.setattr(tls, "VALID_DAYS", 30)
    assert self_signed(tmp_path, ["127.0.0.1"]).certificate.read_bytes() != short


@pytest.mark.parametrize("lost", ["cert.pem", "key.pem"])
def test_what_a_crash_left_is_made_good(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power fails before one of the two files is in its place, on the first start or later."""
    replace = os.replace

    def fail(source: str, target: Path) -> None:
        if target.name == lost:
            raise KeyboardInterrupt
        replace(source, target)

    for names in (["127.0.0.1"], ["127.0.0.1", "camera.local"]):
        monkeypatch.setattr(os, "replace", fail)
        if lost == "cert.pem" or names == ["127.0.0.1"]:  # a key is made once
            with pytest.raises(KeyboardInterrupt):
                self_signed(tmp_path, names)
        monkeypatch.setattr(os, "replace", replace)
        assert set(names) <= alternatives(self_signed(tmp_path, names))
        assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("broken", ["cert.pem", "key.pem"])
@pytest.mark.parametrize("content", [b"", b"hello", b"\xff"])
def test_files_that_belong_to_nothing_are_made_anew(
    broken: str, content: bytes, tmp_path: Path
) -> None:
    self_signed(tmp_path, ["127.0.0.1"])
    (tmp_path / broken).write_bytes(content)
    assert alternatives(self_signed(tmp_path, ["127.0.0.1"])) == {"127.0.0.1"}
    other = self_signed(tmp_path / "other", ["127.0.0.1"])
    (tmp_path / broken).write_bytes((tmp_path / "other" / broken).read_bytes())
    assert other != self_signed(tmp_path, ["127.0.0.1"])  # checks that they belong together


def test_a_certificate_of_the_openssl_program_goes_on(tmp_path: Path) -> None:
    """As it was made before: the same key and certificate are used."""
    program = shutil.which("openssl")
    if program is None:
        pytest.skip("no openssl here")
    command = [
        *(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", "825", "-subj", "/CN=edge-vlm"),
        *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:0:0:0:0:0:0:0:1"),
        *("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")),
    ]
    subprocess.run(command, check=True, capture_output=True)
    before = (tmp_path / "cert.pem").read_bytes(), (tmp_path / "key.pem").read_bytes()
    made = self_signed(tmp_path, ["::1", "localhost"])
    assert (made.certificate.read_bytes(), made.key.read_bytes()) == before


def test_a_strict_client_takes_it(tmp_path: Path) -> None:
    """RFC 5280 to the letter, as Python asks for it since 3.13, by name and by address."""
    made = self_signed(tmp_path, ["127.0.0.1", "localhost"])
    accepting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    accepting.load_cert_chain(made.certificate, made.key)
    asking = ssl.create_default_context(cafile=str(made.certificate))
    asking.verify_flags |= ssl.VERIFY_X509_STRICT
    for name in ("localhost", "127.0.0.1", "elsewhere"):
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = asking.wrap_bio(down, up, server_hostname=name)
        server = accepting.wrap_bio(up, down, server_side=True)
        with suppress(ssl.SSLWantReadError):
            client.do_handshake()
        with suppress(ssl.SSLWantReadError):
            server.do_handshake()
        if name == "elsewhere":
            with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
                client.do_handshake()
        else:
            client.do_handshake()


def test_files_that_are_no_certificate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="PEM"):
        Tls(tmp_path / "nothing.pem", tmp_path / "nothing.pem").check()
    (tmp_path / "text.pem").write_text("hello")
    with pytest.raises(ConfigError, match=r"text\.pem"):
        Tls(tmp_path / "text.pem", tmp_path / "text.pem").check()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError):
        self_signed(tmp_path / "file" / "tls", ["127.0.0.1"])


def test_names_of_this_machine() -> None:
    names = own_names("0.0.0.0")
    assert {"localhost", "127.0.0.1"} <= set(names)
    assert "0.0.0.0" not in names
    assert "" not in names
    assert "camera.local" in own_names("camera.local")
