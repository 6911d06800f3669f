"""A certificate for the server's port: one that was given, or one made on the spot.

Browsers give a camera only to pages from https or from the same machine, so a camera page in the
local network needs TLS. A made certificate is signed by nobody: browsers warn once, our own client
takes it with `--tls-ca`. It is kept for the next start.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import ssl
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeAlias

from edge_vlm.errors import ConfigError, MissingExtraError
from edge_vlm.private_files import exposure, make_folder

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ImportError as error:
    raise MissingExtraError.for_library(error.name or "cryptography", "serve") from error

log = logging.getLogger(__name__)

PrivateKey: TypeAlias = "ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey"

VALID_DAYS = 825
"""The longest that Apple's systems accept."""
RENEW_BEFORE = timedelta(days=7)
"""A certificate that ends sooner is made anew."""
CLOCK_SKEW = timedelta(days=1)
"""So far the clock of a client may be behind ours."""
CERTIFICATE, KEY = "cert.pem", "key.pem"
KEY_USAGE = x509.KeyUsage(
    digital_signature=True,
    key_cert_sign=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)


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
            if (exposed := exposure(self.key)) is not None:
                log.warning("TLS key: %s", exposed)
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

    The key stays when the certificate is made anew, so whatever stands in the folder, even after a
    crash, belongs together or is replaced. Raises ConfigError when it cannot be kept there.
    """
    found = Tls(folder / CERTIFICATE, folder / KEY)
    try:
        if (exposed := make_folder(folder)) is not None:
            log.warning("TLS key: %s", exposed)
        key = _read_key(found.key)
        if key is None:
            key = ec.generate_private_key(ec.SECP256R1())
            text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            _replace(found.key, text, 0o600)
        wanted = [_general_name(name) for name in sorted(set(names))]
        if not _is_good(found.certificate, key, wanted):
            _replace(found.certificate, _make(key, wanted).public_bytes(Encoding.PEM), 0o644)
    except OSError as error:
        raise ConfigError(f"no certificate can be kept here: {error}", where=folder) from error
    return found.check()


def _replace(file: Path, content: bytes, mode: int) -> None:
    """Whole or not at all."""
    handle, place = tempfile.mkstemp(dir=file.parent)  # for nobody else to read
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(content)
            os.fchmod(out.fileno(), mode)
            out.flush()
            os.fsync(out.fileno())
        os.replace(place, file)
    except BaseException:
        os.unlink(place)
        raise


def _read_key(file: Path) -> PrivateKey | None:
    """None where there is none that can sign."""
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (FileNotFoundError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, (ec.EllipticCurvePrivateKey, rsa.RSAPrivateKey)) else None


def _is_good(file: Path, key: PrivateKey, wanted: list[x509.GeneralName]) -> bool:
    """Whether it is this key's, holds the names and lasts."""
    try:
        found = x509.load_pem_x509_certificate(file.read_bytes())
        alternatives = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return False
    lasts = found.not_valid_after_utc > _now() + RENEW_BEFORE
    return lasts and set(wanted) <= set(alternatives) and found.public_key() == key.public_key()


def _make(key: PrivateKey, names: list[x509.GeneralName]) -> x509.Certificate:
    """Its own authority: what clients are given to trust (`--tls-ca`) is the certificate."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "edge-vlm")])
    public = key.public_key()
    begin = _now() - CLOCK_SKEW
    builder = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=VALID_DAYS))
    )
    for extension, critical in (
        (x509.SubjectAlternativeName(names), False),
        (x509.BasicConstraints(ca=True, path_length=0), True),
        (KEY_USAGE, True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(public), False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, hashes.SHA256())


def _general_name(name: str) -> x509.GeneralName:
    with suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise ConfigError(f"no name for a certificate: {error}", where=name) from error


def _now() -> datetime:
    return datetime.now(timezone.utc)
