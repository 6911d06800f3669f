"""The page about proxies: its configurations, run by nginx and Caddy, in front of a real server."""

from __future__ import annotations

import asyncio
import base64
import getpass
import http.client
import json
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime.server.app import Server
from tests.deployment.dockerfile import ROOT
from tests.runtime.alerts.receivers import make_certificate, wait_until
from tests.runtime.ports import KeptPort
from tests.runtime.server.live import TIMEOUT_S
from tests.tiny import tiny_bundle

NAME = "camera.example.org"
KEY = "a-key-of-the-test"
PAGE = (ROOT / "docs" / "proxy.md").read_text()
NGINX = re.findall(r"```nginx\n(.*?)```", PAGE, re.DOTALL)
CADDY = re.findall(r"```caddyfile\n(.*?)```", PAGE, re.DOTALL)
LARGE = encode_jpeg(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server.open(tiny_bundle(), threads=1, hosts=[NAME], api_key=KEY) as running:
        running.start()
        yield running


@contextmanager
def nginx(folder: Path, text: str, upstream: int) -> Iterator[tuple[int, str]]:
    """Port and path below which the server is."""
    kept = KeptPort()  # as long as this generator is there
    port = kept.number
    make_certificate(folder)
    whole, part = text.lstrip().startswith("map"), f"listen 127.0.0.1:{port} ssl;"
    if not whole:
        certificate = "ssl_certificate camera.pem; ssl_certificate_key camera.key;"
        text = f"server {{ listen 443 ssl; server_name {NAME}; {certificate} {text} }}"
    text = text.replace("listen 443 ssl;", part).replace("127.0.0.1:8765", f"127.0.0.1:{upstream}")
    text = re.sub(r"(/etc/nginx/)?camera\.pem", f"{folder}/cert.pem", text)
    text = re.sub(r"(/etc/nginx/)?camera\.key", f"{folder}/key.pem", text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    places = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    file = folder / "nginx.conf"
    file.write_text(
        f"user {getpass.getuser()}; daemon off; pid {folder}/pid; events {{}}\n"
        f"error_log {folder}/error.log;\n"
        f"http {{ access_log off; {places}\n{text}\n}}\n"
    )
    with running(["nginx", "-p", str(folder), "-c", str(file), "-e", str(folder / "early")], port):
        yield port, "" if whole else "/vlm"


@contextmanager
def caddy(folder: Path, text: str, upstream: int) -> Iterator[tuple[int, str]]:
    kept = KeptPort()
    port = kept.number
    file = folder / "Caddyfile"
    text = text.replace(f"{NAME} {{", f"http://{NAME}:{port} {{")
    text = text.replace("127.0.0.1:8765", f"127.0.0.1:{upstream}")
    file.write_text(f"{{\n admin off\n auto_https off\n storage file_system {folder}\n}}\n{text}")
    with running(["caddy", "run", "--config", str(file), "--adapter", "caddyfile"], port):
        yield port, "/vlm" if "/vlm/" in text else ""


@contextmanager
def running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers)
        yield
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


def trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def request(
    port: int, path: str, body: Any = None, *, is_secure: bool, host: str = NAME, key: str = KEY
) -> tuple[int, bytes]:
    made: Any = http.client.HTTPSConnection if is_secure else http.client.HTTPConnection
    options: Any = {"context": trusting()} if is_secure else {}
    connection = made("127.0.0.1", port, timeout=TIMEOUT_S, **options)
    headers = {"Host": host if is_secure else f"{host}:{port}", "Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    method = "GET" if body is None else "POST"
    text = None if body is None else json.dumps(body)
    try:
        connection.request(method, path, text, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def visit(port: int, path: str, model: str, *, is_secure: bool) -> None:
    status, body = request(port, f"{path}/", is_secure=is_secure, key="")
    assert (status, b"<title>" in body) == (200, True)
    assert request(port, f"{path}/v1/models", is_secure=is_secure, key="")[0] == 401
    assert request(port, f"{path}/v1/models", is_secure=is_secure)[0] == 200
    picture = f"data:image/jpeg;base64,{base64.b64encode(LARGE).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": "what is there ?"},
    ]
    chat = {"model": model, "messages": [{"role": "user", "content": content}], "stream": True}
    assert len(json.dumps(chat)) > 1 << 20  # what nginx takes unless told otherwise
    status, body = request(port, f"{path}/v1/chat/completions", chat, is_secure=is_secure)
    assert (status, body.rstrip().endswith(b"data: [DONE]")) == (200, True)
    asyncio.run(converse(port, path, is_secure=is_secure))


async def converse(port: int, path: str, *, is_secure: bool) -> None:
    """As the page does: with its origin, and the key as a subprotocol."""
    scheme, shown = ("wss", NAME) if is_secure else ("ws", f"{NAME}:{port}")
    key = base64.urlsafe_b64encode(KEY.encode()).decode().rstrip("=")
    options: Any = {"ssl": trusting()} if is_secure else {}
    async with connect(
        f"{scheme}://{shown}{path}/v1/realtime",
        host="127.0.0.1",
        port=port,
        origin=f"{'https' if is_secure else 'http'}://{shown}",  # type: ignore[arg-type]
        subprotocols=["edge-vlm", f"edge-vlm-key.{key}"],  # type: ignore[list-item]
        open_timeout=TIMEOUT_S,
        **options,
    ) as websocket:
        first = json.loads(await websocket.recv())
        assert first["type"] == "session.created", first
        await websocket.send('{"type": "ping"}')
        assert json.loads(await websocket.recv())["type"] in ("pong", "session.stats")


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx here (apt install nginx-light)")
@pytest.mark.parametrize("text", NGINX, ids=["root", "below a path"])
def test_nginx(tmp_path: Path, server: Server, text: str) -> None:
    with nginx(tmp_path, text, server.port) as (port, path):
        visit(port, path, server.bundle_name, is_secure=True)
        status, body = request(port, f"{path}/v1/models", is_secure=True, host="elsewhere.example")
        assert (status, json.loads(body)["error"]["code"]) == (403, "E-HOST")


@pytest.mark.skipif(shutil.which("caddy") is None, reason="no Caddy here (apt install caddy)")
@pytest.mark.parametrize("text", CADDY, ids=["root", "below a path"])
def test_caddy(tmp_path: Path, server: Server, text: str) -> None:
    with caddy(tmp_path, text, server.port) as (port, path):
        visit(port, path, server.bundle_name, is_secure=False)
