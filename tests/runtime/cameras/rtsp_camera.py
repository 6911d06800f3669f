"""A small RTSP camera over TCP (RFC 2326, interleaved) that sends motion JPEG (RFC 2435)."""

from __future__ import annotations

import contextlib
import io
import socket
import struct
import threading
import time
from types import TracebackType

import numpy as np
from PIL import Image

CLOCK_HZ = 90_000
PAYLOAD_BYTES = 1200
SDP = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\n"
VIDEO, SOUND = "m=video 0 RTP/AVP 26\r\n", "m=audio 0 RTP/AVP 0\r\n"
JPEG_TYPE, MULAW_TYPE = 26, 0


class RtspCamera:
    """Serves any number of clients; `unplug` ends the present ones."""

    def __init__(self, size: int = 64, fps: float = 25.0, port: int = 0) -> None:
        self._size = size
        self._fps = fps
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listener.getsockname()[1])
        self._clients: list[socket.socket] = []
        self._stopping = False
        self.sound_only = False
        """Of clients to come: as a camera that lost its picture."""
        self.served = 0
        """Clients that came as far as PLAY."""
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def unplug(self) -> None:
        for client in tuple(self._clients):
            with contextlib.suppress(OSError):  # it left
                client.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> RtspCamera:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):  # ends `accept`, which would take one client more
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.unplug()
        self._thread.join(5.0)

    def _serve(self) -> None:
        while not self._stopping:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._clients.append(client)
            threading.Thread(target=self._serve_one, args=(client,), daemon=True).start()

    def _serve_one(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            self._talk(client)
        self._clients.remove(client)

    def _talk(self, client: socket.socket) -> None:
        lines = client.makefile("rb")
        while True:
            request = lines.readline().decode().split()
            if not request:
                return
            headers = {}
            while (line := lines.readline().decode().strip()) != "":
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            method = request[0]
            extra, body = "", ""
            if method == "OPTIONS":
                extra = "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
            elif method == "DESCRIBE":
                body = SDP + (SOUND if self.sound_only else VIDEO)
                extra = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            elif method == "SETUP":
                extra = "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
            reply = f"RTSP/1.0 200 OK\r\nCSeq: {headers['cseq']}\r\nSession: 1\r\n{extra}\r\n{body}"
            client.sendall(reply.encode())
            if method == "PLAY":
                self.served += 1
                self._play(client)
                return

    def _play(self, client: socket.socket) -> None:
        packet_number = 0
        kind = MULAW_TYPE if self.sound_only else JPEG_TYPE
        begin_s = time.monotonic()
        while not self._stopping:
            age_s = time.monotonic() - begin_s
            level = int(age_s * 100) % 200
            silence = [(bytes([0xFF]) * 160, True)]
            picture = silence if kind == MULAW_TYPE else jpeg_payloads(level, self._size)
            for payload, is_last in picture:
                head = struct.pack(
                    ">BBHII",
                    0x80,
                    kind | (0x80 if is_last else 0),
                    packet_number & 0xFFFF,
                    int(age_s * CLOCK_HZ),
                    0x1234,
                )
                packet_number += 1
                packet = head + payload
                client.sendall(b"$\x00" + struct.pack(">H", len(packet)) + packet)
            time.sleep(1 / self._fps)


def jpeg_payloads(level: int, size: int) -> list[tuple[bytes, bool]]:
    """A grey picture as RFC 2435 section 3 wants it: the scan in fragments, the quantisation tables
    before the first one. Type 1 is 4:2:0 with the standard Huffman tables."""
    buffer = io.BytesIO()
    picture = np.full((size, size, 3), level, dtype=np.uint8)
    Image.fromarray(picture).save(buffer, format="JPEG", quality=90, subsampling=2)
    tables, scan = _tables_and_scan(buffer.getvalue())
    payloads = []
    for offset in range(0, len(scan), PAYLOAD_BYTES):
        head = struct.pack(">B", 0) + offset.to_bytes(3, "big")
        head += struct.pack(">BBBB", 1, 255, size // 8, size // 8)
        if offset == 0:
            head += struct.pack(">BBH", 0, 0, len(tables)) + tables
        part = scan[offset : offset + PAYLOAD_BYTES]
        payloads.append((head + part, offset + PAYLOAD_BYTES >= len(scan)))
    return payloads


def _tables_and_scan(jpeg: bytes) -> tuple[bytes, bytes]:
    tables = b""
    position = 2
    while True:
        marker, length = struct.unpack_from(">xBH", jpeg, position)
        segment = jpeg[position + 4 : position + 2 + length]
        position += 2 + length
        if marker == 0xDB:
            while segment:
                tables += segment[1:65]
                segment = segment[65:]
        if marker == 0xDA:
            return tables, jpeg[position:-2]
