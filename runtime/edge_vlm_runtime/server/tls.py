"""A certificate for the server's port: one that was given, or one made on the spot.

Browsers give a camera only to pages from https or from the same machine, so a camera page in the
local network needs TLS. A made certificate is signed by nobody: browsers warn once, our own client
takes it with `--tls-ca`. It is made by the `openssl` program and kept for the next start.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError

VALID_DAYS = 825
"""The longest that Apple's systems accept."""
RENEW_S = 7 * 24 * 3600
"""A certificate that ends sooner is made anew."""
CERTIFICATE, KEY, NAMES = "cert.pem", "key.pem", "names.json"


@dataclass(frozen=True)
class Tls:
    """A certificate and its private key, both PEM."""

    certificate: Path
    key: Path

    def check(self) -> Tls:
        """Raises ConfigError unless they can be read and belong together."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"not a certificate and its key: {error}",
                where=f"{self.certificate}, {self.key}",
                remedy="give PEM files that belong together, the key without a password",
            ) from error
        return self


def default_folder() -> Path:
    """Where a made certificate is kept: $XDG_CONFIG_HOME or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "edge-vlm" / "tls"


def own_names(host: str) -> list[str]:
    """Names and addresses that somebody may reach this machine by, sorted."""
    names = {"localhost", "127.0.0.1", "::1", socket.gethostname(), host}
    with suppress(OSError):
        names.update(str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None))
    for family, elsewhere in (
        (socket.AF_INET, "192.0.2.1"),
        (socket.AF_INET6, "2001:db8::1"),
    ):
        # Connecting a UDP socket sends nothing; it only looks up which address would be used.
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((elsewhere, 9))
            names.add(str(probe.getsockname()[0]))
    usable = {name.partition("%")[0] for name in names}
    return sorted(usable - {"", "0.0.0.0", "::"})


def self_signed(folder: Path, names: Iterable[str]) -> Tls:
    """The certificate in `folder`, made if there is none for these names or it ends soon.

    Raises ConfigError when it cannot be made.
    """
    wanted = list(names)
    found = Tls(folder / CERTIFICATE, folder / KEY)
    if _is_good(found, folder / NAMES, wanted):
        return found.check()
    program = shutil.which("openssl")
    if program is None:
        raise ConfigError(
            "the program openssl is not here to make a certificate",
            remedy="install it, or give one with --tls-cert and --tls-key",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as place:  # nobody else may look inside
            made = Tls(Path(place) / CERTIFICATE, Path(place) / KEY)
            _make(program, made, wanted)
            made.check()
            made.key.chmod(0o600)
            os.replace(made.key, found.key)
            os.replace(made.certificate, found.certificate)
        (folder / NAMES).write_text(json.dumps(wanted), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"no certificate can be kept here: {error}", where=folder) from error
    return found.check()


def _is_good(found: Tls, names: Path, wanted: list[str]) -> bool:
    try:
        if not set(wanted) <= set(json.loads(names.read_text(encoding="utf-8"))):
            return False
    except (OSError, ValueError):
        return False
    program = shutil.which("openssl")
    if program is None:  # then it cannot be made anew either
        return found.certificate.exists()
    command = [program, "x509", "-checkend", str(RENEW_S), "-noout", "-in", str(found.certificate)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _make(program: str, made: Tls, names: list[str]) -> None:
    alternatives = ",".join(f"{_kind(name)}:{name}" for name in names)
    command = [
        *(program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
        *("-nodes", "-days", str(VALID_DAYS), "-subj", "/CN=edge-vlm"),
        *("-addext", f"subjectAltName={alternatives}"),
        *("-addext", "extendedKeyUsage=serverAuth"),
        *("-keyout", str(made.key), "-out", str(made.certificate)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["it gave no reason"]
        raise ConfigError(
            f"openssl could not make a certificate: {lines[-1]}",
            remedy="give one with --tls-cert and --tls-key",
        )


def _kind(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "DNS"
    return "IP"
