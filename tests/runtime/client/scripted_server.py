"""The client's end of a websocket whose server follows a script: each message has its answer at
once, so that long runs take seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedOK
from websockets.frames import Close

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client import connection
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings

DROP_EVERY, NUM_CELLS = 7, 81
NEWEST = protocol.NewestFrame(frame_sequence=1, time_s=0.0, age_s=0.0)


LIMITS = ModelLimits(
    num_cells=NUM_CELLS,
    cell_grid=9,
    image_size=378,
    max_positions=4096,
    max_prefill_tokens=512,
    max_cache_tokens=4096,
    max_time_s=None,
    trained_attention="frame",
)


class ScriptedServer:
    """One connection. `script` is called with each frame's number and may send more."""

    def __init__(self, script: Callable[[int], None] | None) -> None:
        self._events: asyncio.Queue[str | None] = asyncio.Queue()
        self._sequence = 0
        self._script = script
        self.is_closed = False
        self.emit(
            protocol.SessionCreated(
                session_id="s",
                resume_token="t",
                protocol_version=1,
                server="scripted",
                model=protocol.Model(bundle="scripted", limits=LIMITS),
                settings=SessionSettings(),
                limits=ServerLimits(),
            )
        )

    def emit(self, event: protocol.ServerEvent) -> None:
        event.sequence = self._sequence = self._sequence + 1
        self.emit_text(protocol.encode(event))

    def emit_unknown(self, name: str, **fields: Any) -> None:
        self._sequence += 1
        self.emit_text(protocol.json_object({"type": name, "sequence": self._sequence, **fields}))

    def emit_text(self, text: str) -> None:
        self._events.put_nowait(text)

    async def send(self, data: str | bytes) -> None:
        if isinstance(data, bytes):
            self._outcome(protocol.decode_frame_message(data).sequence)
            return
        message = protocol.decode_client_message(data)
        if isinstance(message, protocol.SessionUpdate):
            settings = SessionSettings()
            self.emit(protocol.SessionUpdated(settings=settings, event_id=message.event_id))
        elif isinstance(message, protocol.ResponseCreate):
            self._answer(message)
        elif isinstance(message, protocol.SessionClose):
            self.emit(protocol.SessionClosed(reason="client"))
            self._events.put_nowait(None)

    def _outcome(self, number: int) -> None:
        if self._script is not None:
            self._script(number)
        if number % DROP_EVERY == 0:
            self.emit(protocol.FrameDropped(frame_sequence=number, reason="busy"))
            return
        self.emit(
            protocol.FrameAccepted(
                frame_sequence=number,
                time_s=number * 0.5,
                cells_seen=NUM_CELLS,
                cells_kept=40,
                kept_cells=list(range(40)),
                stage_ms={"decode": 1.0, "vit_stem": 2.0},
                queue_ms=1.0,
                age_ms=2.0,
                kv_tokens=4000,
                in_memory=True,
            )
        )

    def _answer(self, message: protocol.ResponseCreate) -> None:
        name = f"response_{self._sequence}"
        self.emit(
            protocol.ResponseCreated(
                response_id=name, text="?", newest_frame=NEWEST, event_id=message.event_id
            )
        )
        self.emit(protocol.ResponseOutputTextDelta(response_id=name, delta="a ball"))
        self.emit(
            protocol.ResponseDone(
                response_id=name,
                status="completed",
                finish_reason="stop",
                text="a ball",
                usage=protocol.Usage(vision_tokens=9, text_tokens=9, output_tokens=2),
                ttft_s=0.1,
                tokens_per_s=None,
                newest_frame=NEWEST,
                kv_tokens=9,
                time_offset_s=0.0,
            )
        )

    async def recv(self) -> str:
        text = await self._events.get()
        if text is None:
            self._events.put_nowait(None)
            raise ConnectionClosedOK(Close(1000, ""), Close(1000, ""), True)
        return text

    async def close(self) -> None:
        self.is_closed = True
        self._events.put_nowait(None)


@contextmanager
def scripted(script: Callable[[int], None] | None = None) -> Iterator[list[ScriptedServer]]:
    """Clients connect to such a server each; the list has them in order."""
    made: list[ScriptedServer] = []

    async def connect(url: str, access: connection.Access) -> ScriptedServer:
        made.append(ScriptedServer(script))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connection, "_connect", connect)
        yield made
