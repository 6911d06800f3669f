"""Receivers of alerts that can be stopped and started again: a web server and an MQTT broker."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import shutil
import socket
import sqlite3
import ssl
import subprocess
import threading
import time
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import aiomqtt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from edge_vlm_runtime.protocol import alerts as messages
from tests.runtime.cameras.pictures import jpeg
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S

MOSQUITTO = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def triggered(episode: int, picture: bytes | None = None) -> messages.AlertTriggered:
    evidence = None
    if picture is not None:
        evidence = messages.Evidence(frame_sequence=episode, time_s=0.5, jpeg=picture, exact=True)
    return messages.AlertTriggered(
        alert_id="alert_1",
        episode=episode,
        question="is there a red ball ?",
        probability=0.9,
        frame_sequence=episode,
        time_s=0.5 * episode,
        age_s=0.01,
        evidence=evidence,
    )


def cleared(episode: int) -> messages.AlertCleared:
    return messages.AlertCleared(
        alert_id="alert_1",
        episode=episode,
        question="is there a red ball ?",
        reason="probability",
        probability=0.1,
        frame_sequence=episode,
        time_s=0.5 * episode + 0.25,
        lasted_s=0.25,
    )


def some_events(first: int, last: int) -> list[messages.AlertTriggered | messages.AlertCleared]:
    """A begin, with a picture, and an end for each of the episodes."""
    return [
        event
        for episode in range(first, last + 1)
        for event in (triggered(episode, jpeg(episode)), cleared(episode))
    ]


class WebServer:
    """Answers each POST with `status`, keeps what it answered with 2xx; the same port always."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._port = KeptPort()
        self.port = self._port.number
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}/alerts"
        self.status = 204
        self.max_bytes = 1 << 30
        """Of a body; 413 above it."""
        self.location: str | None = None
        """Of a redirect."""
        self.authorizations: list[str | None] = []
        self._tls = tls
        self.posts = 0
        self.taken: list[dict[str, Any]] = []
        self._server: ThreadingHTTPServer | None = None
        self._connections: list[socket.socket] = []

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.posts += 1
                outer.authorizations.append(self.headers["Authorization"])
                status = outer.status
                if int(self.headers["Content-Length"]) > outer.max_bytes:
                    status = 413
                if 200 <= status < 300:
                    assert self.headers["Idempotency-Key"] == body["id"]
                    outer.taken.append(body)
                self.send_response(status)
                if outer.location is not None:
                    self.send_header("Location", outer.location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def process_request(self, request: Any, client_address: Any) -> None:
                # Before its thread begins, so that `stop` knows of every connection there is.
                outer._connections.append(request)
                super().process_request(request, client_address)

        self._server = Server(("127.0.0.1", self.port), Handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in self._connections:  # kept alive, but not by a server that died
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    @property
    def ids(self) -> list[str]:
        return [body["id"] for body in self.taken]

    def __enter__(self) -> WebServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def make_certificate(folder: Path) -> Path:
    """`cert.pem` for 127.0.0.1, signed by itself, with its key in `key.pem`."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(timezone.utc)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    return folder / "cert.pem"


class SilentServer:
    """Takes connections and never says anything."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        try:
            while True:
                self._connections.append(self._socket.accept()[0])
        except OSError:
            return

    def __enter__(self) -> SilentServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for connection in self._connections:
            connection.close()
        self._thread.join()


class Broker:
    """mosquitto with sessions that outlive it, for user `edge` with password `s e:cret`."""

    USER, PASSWORD = "edge", "s e:cret"
    READER = "home"
    """May do everything, whatever the other one's rights are."""

    def __init__(
        self,
        folder: Path,
        certificate: Path | None = None,
        max_packet_bytes: int | None = None,
        rights: str | None = None,
    ) -> None:
        """With a certificate, its key beside it in `key.pem`, it speaks TLS. `rights`: lines of an
        acl_file."""
        assert MOSQUITTO is not None
        self._port = KeptPort()
        self.port = self._port.number
        passwords = folder / "passwords"
        tool = str(Path(MOSQUITTO).with_name("mosquitto_passwd"))
        tool = tool if Path(tool).exists() else str(shutil.which("mosquitto_passwd"))
        passwords.touch(0o600)
        for user in (self.USER, self.READER):
            line = [tool, "-b", str(passwords), user, self.PASSWORD]
            subprocess.run(line, check=True, capture_output=True)
        passwords.chmod(0o644)
        folder.chmod(0o777)
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\n"
            f"persistence true\npersistence_location {folder}/\nuser {_user()}\n"
            + (f"certfile {certificate}\nkeyfile {folder}/key.pem\n" if certificate else "")
            + (f"acl_file {folder}/rights\n" if rights else "")
            + (f"max_packet_size {max_packet_bytes}\n" if max_packet_bytes else "")
        )
        if rights:
            (folder / "rights").write_text(f"{rights}\nuser {self.READER}\ntopic readwrite #\n")
            (folder / "rights").chmod(0o644)
        self.url = f"mqtt://edge:s%20e%3Acret@127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert MOSQUITTO is not None
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self._config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "it ended"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            process.wait()

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def _user() -> str:
    import getpass

    return getpass.getuser()


class OldBroker:
    """Speaks MQTT 3.1.1 only, has never heard of a limit, and cuts the connection above its own."""

    def __init__(self, max_packet_bytes: int, *, says_so: bool = True) -> None:
        """Not `says_so`: a version that it does not know costs the connection without an answer."""
        self.max_packet_bytes, self.says_so = max_packet_bytes, says_so
        self.taken: list[tuple[str, bytes]] = []
        self.refused_bytes: list[int] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            # Around the stream, too: as it is closed, it writes what a client did not wait for.
            with suppress(OSError, EOFError), connection, connection.makefile("rwb") as stream:
                self._serve(stream)

    def _serve(self, stream: Any) -> None:
        while True:
            kind, packet = self._packet(stream)
            if kind >> 4 == 1 and packet[6] != 4:  # CONNECT with another version
                if self.says_so:
                    stream.write(b"\x20\x02\x00\x01")
                    stream.flush()
                return
            if kind >> 4 == 1:
                stream.write(b"\x20\x02\x00\x00")
            elif kind >> 4 == 3:  # PUBLISH with QoS 1
                end = 2 + int.from_bytes(packet[:2], "big")
                if len(packet) > self.max_packet_bytes:
                    self.refused_bytes.append(len(packet))
                    return
                self.taken.append((packet[2:end].decode(), packet[end + 2 :]))
                stream.write(b"\x40\x02" + packet[end : end + 2])
            elif kind >> 4 == 14:  # DISCONNECT
                return
            stream.flush()

    @staticmethod
    def _packet(stream: Any) -> tuple[int, bytes]:
        head = stream.read(1)
        if not head:
            raise EOFError
        size = shift = 0
        while True:
            if not (more := stream.read(1)):
                raise EOFError
            (digit,) = more
            size |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return head[0], stream.read(size)

    def __enter__(self) -> OldBroker:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join()


class Subscriber:
    """Keeps every message on a topic and below, across the broker's restarts."""

    def __init__(self, broker: Broker, topic: str) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self._broker, self._topic = broker, topic
        self._subscribed = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._subscribed.wait(TIMEOUT_S)

    def _run(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _listen(self) -> None:
        while True:
            client = aiomqtt.Client(
                "127.0.0.1",
                self._broker.port,
                username=Broker.USER,
                password=Broker.PASSWORD,
                identifier="subscriber",
                clean_session=False,
                timeout=TIMEOUT_S,
            )
            try:
                async with client:
                    await client.subscribe(f"{self._topic}/#", qos=1)
                    self._subscribed.set()
                    async for message in client.messages:
                        assert isinstance(message.payload, bytes)
                        self.messages.append((message.topic.value, message.payload))
            except aiomqtt.MqttError:
                await asyncio.sleep(0.1)  # until it is back

    def bodies(self, topic: str) -> list[dict[str, Any]]:
        return [json.loads(payload) for name, payload in self.messages if name == topic]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()


class Home:
    """Another client of the broker: the newest message of each topic."""

    def __init__(self, broker: Broker, user: str = Broker.USER) -> None:
        self._broker, self._user = broker, user
        self.seen: dict[str, bytes] = {}
        self.heard: list[tuple[str, bytes]] = []
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(TIMEOUT_S)

    def _run(self) -> None:
        self._loop.run_until_complete(asyncio.wait([self._task]))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    async def _listen(self) -> None:
        self._client = aiomqtt.Client(
            "127.0.0.1",
            self._broker.port,
            username=self._user,
            password=Broker.PASSWORD,
            timeout=TIMEOUT_S,
        )
        async with self._client as client:
            await client.subscribe("#", qos=1)
            self._ready.set()
            async for message in client.messages:
                assert isinstance(message.payload, bytes)
                topic = message.topic.value
                self.heard.append((topic, message.payload))
                if message.payload:
                    self.seen[topic] = message.payload
                else:
                    self.seen.pop(topic, None)

    def say(self, topic: str, payload: str | bytes, *, retain: bool = False) -> None:
        """Returns when the broker has it, which may be before anybody has it from there."""
        sending = self._client.publish(topic, payload, qos=1, retain=retain)
        asyncio.run_coroutine_threadsafe(sending, self._loop).result(TIMEOUT_S)

    def catch_up(self) -> None:
        """Returns when all that the broker has had so far has come here: it keeps the order."""
        mark = secrets.token_hex(8)
        self.say("mark", mark)
        wait_until(lambda: self.seen.get("mark") == mark.encode())

    def send(self, topic: str, payload: str) -> None:
        """Without waiting for the broker."""
        sending = self._client.publish(topic, payload, qos=0)
        asyncio.run_coroutine_threadsafe(sending, self._loop)

    def text(self, topic: str) -> str:
        return self.seen.get(topic, b"").decode()

    def json(self, topic: str) -> dict[str, Any]:
        found = json.loads(self.seen.get(topic, b"{}"))
        assert isinstance(found, dict)
        return found

    @property
    def configs(self) -> list[str]:
        return sorted(self.below("homeassistant/"))

    def below(self, part: str) -> list[str]:
        """Topics with this in their name."""
        return [topic for topic in list(self.seen) if part in topic]

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()


class Disk:
    """Databases on it fail with `error` while that is set. For `DeliveryQueue(connect=...)`."""

    def __init__(self) -> None:
        self.error: sqlite3.Error | None = None
        self.turns = threading.Event()
        """Cleared, it stands still."""
        self.turns.set()
        self.is_waited_for = threading.Event()
        """Somebody has come to write, whether or not it turns."""
        self.failures = 0

    def connect(self, *arguments: Any, **options: Any) -> sqlite3.Connection:
        disk = self

        class Connection(sqlite3.Connection):
            def executemany(self, *statement: Any) -> sqlite3.Cursor:
                disk.is_waited_for.set()
                assert disk.turns.wait(TIMEOUT_S)
                if disk.error is not None:
                    disk.failures += 1
                    raise disk.error
                return super().executemany(*statement)

        return sqlite3.connect(*arguments, factory=Connection, **options)
