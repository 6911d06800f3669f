"""A server with the demo model, and what its clients send."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from edge_vlm.pixels.frames import encode_jpeg
from edge_vlm.pixels.video import read_video
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE, DEMO_FOLDER
from edge_vlm_runtime.inference.language import LanguageModel
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.protocol.settings import ServerLimits
from edge_vlm_runtime.server.app import Server

if TYPE_CHECKING:
    import openai

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
    **limits: Any,
) -> Iterator[Server]:
    with Server.open(
        bundle,
        threads=1,
        limits=ServerLimits(**limits),
        media=media,
        api_key=api_key,
        origins=origins,
    ) as server:
        server.start()
        yield server


def held_answers(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Answers stop after their first tokens until the event is set."""
    goes_on = threading.Event()
    decode = LanguageModel.decode_step

    def decode_step(self: LanguageModel, arena: Any, token_id: int) -> Any:
        assert goes_on.wait(TIMEOUT_S), "nobody let the answer go on"
        return decode(self, arena, token_id)

    monkeypatch.setattr(LanguageModel, "decode_step", decode_step)
    return goes_on


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
    return [encode_jpeg(rgb) for _, rgb in read_video(CLIP, 2.0)]


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
