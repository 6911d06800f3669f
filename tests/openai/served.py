"""A server with the demo model, and what its clients send."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.session.asking.answer import Answer
from edge_vlm_runtime.session.session import Session

if TYPE_CHECKING:
    import openai
    from websockets.asyncio.client import ClientConnection

CLIP = DEMO_FOLDER / "clip.mp4"
TIMEOUT_S = 120.0
"""Generous: a busy machine is no failure."""


@contextmanager
def serving(
    bundle: Path = DEMO_BUNDLE,
    *,
    media: MediaRules | None = None,
    api_key: str | None = None,
    origins: tuple[str, ...] = (),
    settings: Mapping[str, Any] | None = None,
    **limits: Any,
) -> Iterator[Server]:
    with Server.open(
        bundle,
        threads=1,
        limits=ServerLimits(**limits),
        media=media,
        api_key=api_key,
        origins=origins,
        settings=settings,
    ) as server:
        server.start()
        yield server


class HeldAnswers:
    """Answers stop after their first token until they are let go.

    The engines' thread goes its rounds meanwhile: what is asked and cancelled comes to the sessions
    while the answer stands, however late that is, instead of in a race with its last token.
    """

    ROUND_S = 0.005
    """Of the engines' thread, without a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._all_go = threading.Event()
        self._go: set[str] = set()
        decode = Session._decode_one_token

        def decode_one(session: Session, answer: Answer, now_ns: int) -> None:
            is_held = answer._output_tokens > 0 and answer.response_id not in self._go
            if not is_held or self._all_go.wait(self.ROUND_S):
                decode(session, answer, now_ns)

        monkeypatch.setattr(Session, "_decode_one_token", decode_one)

    def let_go(self, response_id: str | None = None) -> None:
        """This answer, of whichever session; without an id all of them, from now on."""
        if response_id is None:
            self._all_go.set()
        else:
            self._go.add(response_id)


async def next_event(line: ClientConnection) -> dict[str, Any]:
    """The next one that something led to: `session.stats` come once a second by themselves."""
    while True:
        event: dict[str, Any] = json.loads(await line.recv())
        if event["type"] != "session.stats":
            return event


@contextmanager
def client_of(server: Server, key: str = "none") -> Iterator[openai.OpenAI]:
    """OpenAI's own, which does not try again."""
    import openai

    with openai.OpenAI(
        base_url=f"{server.page_url}v1", api_key=key, max_retries=0, timeout=TIMEOUT_S
    ) as client:
        yield client


def post(server: Server, body: Any, **headers: str) -> httpx.Response:
    """A chat request without a client's help."""
    content = {"content": body} if isinstance(body, bytes) else {"json": body}
    return httpx.post(
        f"{server.page_url}v1/chat/completions",
        headers={name.replace("_", "-"): value for name, value in headers.items()},
        timeout=TIMEOUT_S,
        **content,
    )


def clip_frames() -> list[bytes]:
    """JPEGs of the demo clip, two a second."""
    return list(_frames_of(CLIP))


@cache
def _frames_of(clip: Path) -> tuple[bytes, ...]:
    return tuple(encode_jpeg(rgb) for _, rgb in read_video(clip, 2.0))


def png(rgb: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_part(data: bytes, kind: str = "image/jpeg", **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_uri(data, kind), **more}}


def user(*parts: dict[str, Any] | str) -> list[dict[str, Any]]:
    """One message of the user's."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]
    return [{"role": "user", "content": content}]
