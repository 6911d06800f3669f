"""The clients of `attacks`, each a process of its own: light to start, so without torch.

python -m benchmarks.runtime.loads.attack_clients viewer ADDRESS KEY
python -m benchmarks.runtime.loads.attack_clients KIND ADDRESS KEY

Both go on until their standard input ends. The viewer prints a line of JSON for each question, and
one at the end; an attacker says "ready", waits for a line, and does what it can with one connection
at a time.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import websockets
from PIL import Image

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm_runtime import protocol

QUESTION = "is there a red ball ?"
FPS, EVERY_S = 4.0, 0.2
TEXT, BINARY, CONTINUED, PING = 1, 2, 0, 9
SIDE = 7900
"""A square of this side is just below the largest picture that is taken."""
PATIENCE_S = 30.0
Making = Callable[[], Iterable[bytes | float]]
"""What is sent on a connection; a number is a pause in seconds."""
MOST_TEXT = 19_900
"""Characters of one text; a little more is refused."""


def pictures(number: int = 24) -> list[bytes]:
    """A square that moves."""
    dice = np.random.default_rng(0)
    found = []
    for step in range(number):
        rgb = np.full((192, 192, 3), 30 + 8 * step % 200, np.uint8)
        x, y = step * 17 % 150, step * 29 % 150
        rgb[y : y + 40, x : x + 40] = dice.integers(0, 255, 3)
        found.append(encode_jpeg(rgb))
    return found


# ---- the viewer ------------------------------------------------------------------------------


async def view(address: str, key: str) -> None:
    url, jpegs = f"ws://{address}{protocol.PATH}", pictures()
    asked: dict[str, float] = {}
    outcomes: dict[int, int] = {}
    names: dict[str, str] = {}
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(
        target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True
    ).start()
    headers = {"Authorization": f"Bearer {key}"}
    async with websockets.connect(
        url, compression=None, max_size=None, additional_headers=headers, open_timeout=PATIENCE_S
    ) as line:

        def first_word(response_id: str) -> None:
            sent_s = asked.pop(names.pop(response_id, ""), None)
            if sent_s is not None:
                now_s = time.monotonic()
                print(json.dumps({"at_s": sent_s, "ttft_s": now_s - sent_s}), flush=True)

        async def read() -> None:
            async for text in line:
                event = json.loads(text)
                kind = event["type"]
                if kind in ("frame.accepted", "frame.dropped"):
                    number = event["frame_sequence"]
                    outcomes[number] = outcomes.get(number, 0) + 1
                elif kind == "response.created":
                    names[event["response_id"]] = event["event_id"]
                elif kind in ("response.output_text.delta", "response.done"):
                    first_word(event["response_id"])
                elif kind == "error":
                    asked.pop(event["error"].get("event_id"), None)

        reading = asyncio.create_task(read())
        sent = questions = 0
        begin_s = time.monotonic()
        next_s = begin_s + 0.5
        settings = {"fps_cap": 1000.0, "drop_duplicates": False}
        await line.send(json.dumps({"type": "session.update", "session": settings}))
        while not ended.is_set() and not reading.done():
            now_s = time.monotonic()
            if now_s >= begin_s + sent / FPS:
                frame = protocol.frame_message(
                    sent, round((now_s - begin_s) * 1e6), jpegs[sent % len(jpegs)]
                )
                await line.send(frame.encode())
                sent += 1
            if now_s >= next_s and not asked:
                questions += 1
                asked[f"q{questions}"], next_s = now_s, now_s + EVERY_S
                await line.send(
                    json.dumps(
                        {"type": "response.create", "event_id": f"q{questions}", "text": QUESTION}
                    )
                )
            await asyncio.sleep(0.004)
        for _ in range(round(PATIENCE_S / 0.02)):
            if reading.done() or not (asked or len(outcomes) < sent):
                break
            await asyncio.sleep(0.02)
        told = {
            "is_cut": reading.done(),
            "unanswered": len(asked),
            "lost": sent - len(outcomes),
            "told_twice": sum(count > 1 for count in outcomes.values()),
        }
        print(json.dumps(told), flush=True)
        reading.cancel()


# ---- pictures that cost much -----------------------------------------------------------------


def _segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


@cache
def progressive(scans: int, side: int = SIDE, limit: int = 7 << 20) -> bytes:
    """A JPEG of so many scans that say nothing, each a walk over all blocks."""
    blocks = (-(-side // 8)) ** 2
    empty = "".join(
        "0" + format(run - 16384, "014b") if run >= 16384 else "10" * run
        for run in [31710] * (blocks // 31710) + [blocks % 31710]
    )
    bits = int(empty.ljust(-(-len(empty) // 8) * 8, "1"), 2).to_bytes(-(-len(empty) // 8), "big")
    again = _segment(0xDA, b"\1\1\0\x01\x3f\0") + bits.replace(b"\xff", b"\xff\0")
    head = b"".join(
        [
            b"\xff\xd8",
            _segment(0xDB, b"\0" + bytes([16] * 64)),
            _segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"),
            _segment(0xC4, b"\0" + bytes([1] + [0] * 15) + b"\0"),
            _segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\0"),
            _segment(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8)),
        ]
    )
    return head + again * min(scans - 1, limit // len(again)) + b"\xff\xd9"


@cache
def arithmetic(scans: int, side: int = SIDE) -> bytes:
    """The same, coded arithmetically: a picture of any size in some hundred bytes."""
    frame = struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0"
    first = _segment(0xDA, b"\1\1\0" + (b"\0\0\0" if scans > 1 else b"\0\x3f\0")) + bytes(2)
    again = _segment(0xDA, b"\1\1\0\x01\x3f\0") + bytes(2)
    return b"".join(
        [
            b"\xff\xd8" + _segment(0xDB, b"\0" + bytes([16] * 64)),
            _segment(0xCA if scans > 1 else 0xC9, frame) + first,
            again * (scans - 1) + b"\xff\xd9",
        ]
    )


@cache
def plain(kind: str, side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (side, side), 7).save(buffer, kind)
    return buffer.getvalue()


@cache
def segments() -> bytes:
    """A JPEG behind a million empty comments."""
    return b"\xff\xd8" + b"\xff\xfe\0\2" * (1 << 20) + plain("JPEG", 64)[2:]


# ---- what is sent ----------------------------------------------------------------------------


def framed(payload: bytes, opcode: int = TEXT, *, final: bool = True) -> bytes:
    """A websocket frame of a client, masked with zeros."""
    head = bytes([opcode | (0x80 if final else 0)])
    size = len(payload)
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 1 << 16:
        head += struct.pack(">BH", 0x80 | 126, size)
    else:
        head += struct.pack(">BQ", 0x80 | 127, size)
    return head + bytes(4) + payload


def message(kind: str, **fields: Any) -> bytes:
    return framed(json.dumps({"type": kind, **fields}, ensure_ascii=False).encode())


def setting(**fields: Any) -> bytes:
    return message("session.update", session=fields)


def frame(number: int, data: bytes) -> bytes:
    return framed(protocol.frame_message(number, number * 250_000, data).encode(), BINARY)


def remembered() -> bytes:
    """A session with something in its memory."""
    jpegs = pictures()
    whole = setting(delivery="wait", keep_ratio=1.0, drop_duplicates=False)
    return whole + b"".join(frame(number, jpegs[number % 24]) for number in range(30))


def shown(data: bytes, pause_s: float = 0.05) -> Iterator[bytes | float]:
    """As live frames."""
    yield setting(fps_cap=1000.0, drop_duplicates=False)
    for number in itertools.count():
        yield frame(number, data)
        yield pause_s


def alarmed() -> Iterator[bytes | float]:
    """As many alerts as there may be, each with a long question, on every frame."""
    jpegs = pictures()
    yield setting(fps_cap=1000.0, drop_duplicates=False, keep_ratio=1.0)
    for number in range(16):
        question = (QUESTION + " ") * 18 + str(number)
        yield message("alert.create", question=question, report_checks=True)
    for number in itertools.count():
        yield frame(number, jpegs[number % 24])
        yield 0.01


def still(data: bytes, kind: str) -> Iterator[bytes | float]:
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    item = {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": uri},
            {"type": "input_text", "text": QUESTION},
        ],
    }
    while True:
        yield message("conversation.item.create", item=item)
        yield message("response.create")
        yield 0.2


def looked_at(data: bytes) -> Iterator[bytes | float]:
    """A large picture, and questions that want all its detail."""
    yield setting(fps_cap=1000.0, drop_duplicates=False)
    yield frame(1, data)
    while True:
        yield message("response.create", text=QUESTION, detail="snapshot")
        yield 0.1


def over(*parts: bytes, begin: bytes = b"") -> Callable[[], Iterator[bytes | float]]:
    """The same again and again."""
    blob = b"".join(parts)
    blob *= max(1, (64 << 10) // len(blob))
    return lambda: itertools.chain([begin] if begin else [], itertools.repeat(blob))


def dialogue(number: int) -> bytes:
    item = {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "\u0344" * MOST_TEXT}],
    }
    return message("response.create", response={"input": [item] * number})


EMOJI = "\U0001f4a5" * MOST_TEXT
SHAPES: dict[str, list[dict[str, object]]] = {"input": [{}] * 200_000}
ASK = message("response.create", text=QUESTION)
CANCEL = message("response.cancel")
ALERTS = [message("alert.create", question=QUESTION)] + [
    message("alert.delete", alert_id=f"alert_{number}") for number in range(1, 40)
]

WITH_KEY: dict[str, Making] = {
    "picture: 3,000 scans": lambda: shown(progressive(3000)),
    "picture: 60 scans": lambda: shown(progressive(60)),
    "picture: arithmetic": lambda: shown(arithmetic(1)),
    "picture: arithmetic, 3,000 scans": lambda: shown(arithmetic(3000)),
    "picture: 62 megapixels": lambda: shown(plain("JPEG")),
    "picture: a million segments": lambda: shown(segments()),
    "picture: claims 4 gigapixels": lambda: shown(arithmetic(1, 65_500)),
    "picture: 62 megapixels, in full detail": lambda: looked_at(plain("JPEG")),
    "picture: 62 megapixels of PNG": lambda: still(plain("PNG"), "png"),
    "picture: 62 megapixels of WebP": lambda: still(plain("WEBP"), "webp"),
    "picture: 62 megapixels of GIF": lambda: still(plain("GIF"), "gif"),
    "settings: attention": over(
        setting(attention="exact"), setting(attention="frame"), begin=remembered()
    ),
    "settings: window": over(
        setting(window_tokens=100), setting(window_tokens=0), begin=remembered()
    ),
    "alerts: made and deleted": over(*ALERTS, begin=remembered()),
    "alerts: sixteen, on every frame": alarmed,
    "questions: asked and cancelled": over(ASK, CANCEL, begin=remembered()),
    "questions: exact, asked and cancelled": over(
        setting(attention="exact"), ASK, CANCEL, begin=remembered()
    ),
    "text: long questions": over(message("response.create", text=EMOJI), begin=remembered()),
    "text: long instructions": over(setting(instructions="\u0344" * MOST_TEXT)),
    "text: a long dialogue": over(dialogue(60), begin=remembered()),
    "text: 8 MB of items": over(message("response.create", response=SHAPES)),
    "messages: tiny": over(framed(b"{}")),
    "messages: pings": over(message("ping")),
    "messages: empty frames": over(frame(1, b"")),
    "messages: fragments": over(
        framed(b"", CONTINUED, final=False), begin=framed(b"", TEXT, final=False)
    ),
    "websocket pings": over(framed(b"x" * 125, PING)),
    "websocket pings, nothing read": over(framed(b"x" * 125, PING)),
}
WITHOUT_KEY: dict[str, Making] = {
    "no key: tiny messages": over(framed(b"{}")),
    "no key: websocket pings, nothing read": over(framed(b"x" * 125, PING)),
    "no key: messages without end": over(framed(b" " * (15 << 20))[: 1 << 20]),
}
HTTP = {
    "HTTP: 62 megapixels of PNG": lambda: plain("PNG"),
    "HTTP: 60 scans": lambda: progressive(60),
}
KINDS = [*WITH_KEY, *WITHOUT_KEY, *HTTP]


# ---- attackers -------------------------------------------------------------------------------


def _connect(address: str, key: str | None, *, reads: bool) -> socket.socket:
    host, _, port = address.rpartition(":")
    line = socket.create_connection((host, int(port)), timeout=PATIENCE_S)
    if not reads:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    secret = f"Authorization: Bearer {key}\r\n" if key else ""
    line.sendall(
        f"GET {protocol.PATH} HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n"
        f"Connection: Upgrade\r\nSec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}\r\n"
        f"Sec-WebSocket-Version: 13\r\n{secret}\r\n".encode()
    )
    answer = b""
    while b"\r\n\r\n" not in answer and (piece := line.recv(1)):
        answer += piece
    if reads:
        threading.Thread(target=_read, args=(line,), daemon=True).start()
    return line


def _read(line: socket.socket) -> None:
    with suppress(OSError):
        while line.recv(1 << 20):
            pass


def flood(make: Making, address: str, key: str | None, *, reads: bool) -> None:
    """One connection after the other, each until it is cut."""
    while True:
        with suppress(OSError), _connect(address, key, reads=reads) as line:
            line.settimeout(600)
            for piece in make():
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    line.sendall(piece)
        time.sleep(0.02)


def request(picture: bytes, address: str, key: str) -> None:
    import httpx

    uri = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": QUESTION},
    ]
    body = json.dumps({"model": "demo", "messages": [{"role": "user", "content": parts}]}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    url = f"http://{address}/v1/chat/completions"
    with httpx.Client(timeout=600.0) as client:
        while True:
            reply = client.post(url, content=body, headers=headers)
            time.sleep(1.0 if reply.status_code in (429, 503) else 0.02)


def _wait_for_go() -> None:
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()


def attack(kind: str, address: str, key: str) -> None:
    reads = "nothing read" not in kind
    if kind in HTTP:
        picture = HTTP[kind]()
        _wait_for_go()
        request(picture, address, key)
    make = {**WITH_KEY, **WITHOUT_KEY}[kind]
    next(iter(make()))  # pictures are made once
    _wait_for_go()
    flood(make, address, key if kind in WITH_KEY else None, reads=reads)


def main(argv: Sequence[str]) -> int:
    kind, address, key = argv
    if kind == "viewer":
        asyncio.run(view(address, key))
        return 0
    attack(kind, address, key)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
