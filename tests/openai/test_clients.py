"""Requests of clients that know nothing of us, byte for byte what they send, by the configuration
that their page shows. Written from what their sources were seen to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import yaml

from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm_runtime.openai.media import MediaRules
from edge_vlm_runtime.server.app import Server
from tests.openai.letters import letters_bundle
from tests.openai.served import CLIP, TIMEOUT_S, clip_frames, data_uri, png, serving

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = "what is there now ?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With a model that can write JSON, and every key that a page shows."""
    with serving(
        letters_bundle(tmp_path_factory.mktemp("letters")),
        api_key=yaml_of("frigate.md")["genai"]["edge_vlm"]["api_key"],
        media=MediaRules(folders=(CLIP.parent,)),
    ) as running:
        yield running


def yaml_of(page: str) -> dict[str, Any]:
    """The configuration on a page of the documentation."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    loaded: dict[str, Any] = yaml.safe_load(block)
    return loaded


def here(server: Server, url: str) -> str:
    """An address of a page, at this server."""
    parts = urlsplit(url)
    assert parts.port == 8765  # what `serve` takes unless it is told otherwise
    return f"{server.page_url.rstrip('/')}{parts.path}"


@pytest.fixture(scope="module")
def frames() -> list[bytes]:
    return clip_frames()[:4]


def test_frigate(server: Server, frames: list[bytes]) -> None:
    """Descriptions, review summaries and chat, with the settings of its page."""
    import openai

    settings = yaml_of("frigate.md")["genai"]["edge_vlm"]
    assert settings["provider"] == "openai"
    with openai.OpenAI(
        api_key=settings["api_key"],
        base_url=here(server, settings["base_url"]),
        max_retries=0,
        timeout=TIMEOUT_S,
    ) as provider:
        (model,) = provider.models.list().data
        assert getattr(model, "max_model_len", None)
        content: list[Any] = [{"type": "text", "text": QUESTION}]
        for number, frame in enumerate(frames):
            content.append({"type": "text", "text": f"image {number}"})
            image = {"url": data_uri(frame), "detail": "low"}
            content.append({"type": "image_url", "image_url": image})
        schema = {
            "type": "object",
            "properties": {
                "confidence": {"enum": [0, 1, 2]},
                "scene": {"type": "string", "maxLength": 12},
                "other": {"type": "array", "items": {"enum": ["car", "dog"]}, "maxItems": 2},
            },
            "required": ["confidence", "scene"],
            "additionalProperties": False,
        }
        form: Any = {
            "type": "json_schema",
            "json_schema": {"name": "review", "strict": True, "schema": schema},
        }
        done = provider.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": content}],
            timeout=TIMEOUT_S,
            response_format=form,
        )
        assert (done.choices[0].message.content or "").startswith('{"confidence": ')
        assert done.usage is not None
        assert done.usage.prompt_tokens > 0

        tools: Any = [
            {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}
        ]
        stream = provider.chat.completions.create(
            model=model.id,
            messages=[{"role": "system", "content": "a b"}, {"role": "user", "content": QUESTION}],
            stream=True,
            stream_options={"include_usage": True},
            tools=tools,
            tool_choice="auto",
            max_tokens=8,
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert chunks[-1].usage is not None


def test_llm_vision(server: Server, frames: list[bytes]) -> None:
    """The check of a new provider, then a question in its form."""
    page = (DOCS / "llm-vision.md").read_text(encoding="utf-8")
    (endpoint,) = re.findall(r"`(http://[^`]*/v1/chat/completions)`", page)
    (key,) = re.findall(r"API key \| `([^`]+)`", page)
    action = yaml_of("llm-vision.md")["data"]
    headers = {"Content-type": "application/json", "Authorization": f"Bearer {key}"}

    def ask(body: dict[str, Any]) -> Any:
        reply = httpx.post(here(server, endpoint), json=body, headers=headers, timeout=TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        return reply.json()

    model = "letters"
    check = ask(
        {
            "model": model,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        }
    )
    assert check["choices"][0]["message"]["role"] == "assistant"
    parts: list[Any] = []
    for number, frame in enumerate(frames[:2]):
        parts.append({"type": "text", "text": f"camera {number}:"})
        parts.append({"type": "image_url", "image_url": {"url": data_uri(frame)}})
    parts.append({"type": "text", "text": action["message"]})
    schema = yaml.safe_load(action["structure"])
    found = ask(
        {
            "model": model,
            "messages": [
                {"role": "system", "content": "a b"},
                {"role": "user", "content": parts},
            ],
            "max_completion_tokens": 3000,
            "temperature": 0.5,
            "top_p": 0.9,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "response", "strict": True, "schema": schema},
            },
        }
    )
    assert found["choices"][0]["message"]["content"] in ('{"parcel": true}', '{"parcel": false}')


def test_open_webui(server: Server, frames: list[bytes]) -> None:
    """The list of models, a picture in a chat, and a title for it."""
    settings = yaml_of("open-webui.md")["services"]["open-webui"]["environment"]
    base = here(server, settings["OPENAI_API_BASE_URL"])
    headers = {"Authorization": f"Bearer {settings['OPENAI_API_KEY']}"}
    with httpx.Client(headers=headers, timeout=TIMEOUT_S) as client:
        models = client.get(f"{base}/models").json()
        assert [model["id"] for model in models["data"]] == ["letters"]
        content = [
            {"type": "text", "text": QUESTION},
            {"type": "image_url", "image_url": {"url": data_uri(png(decode_jpeg(frames[0])))}},
        ]
        body: dict[str, Any] = {
            "model": "letters",
            "stream": True,
            "max_tokens": 6,
            "messages": [{"role": "user", "content": content}],
        }
        with client.stream("POST", f"{base}/chat/completions", json=body) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in reply.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        title = {**body, "stream": False, "max_completion_tokens": 10}
        assert client.post(f"{base}/chat/completions", json=title).status_code == 200


def test_lmms_eval(server: Server, frames: list[bytes]) -> None:
    """Its chat model with the arguments of the page: frames as PNG, with stamps, and by path."""
    page = (DOCS / "lmms-eval.md").read_text(encoding="utf-8")
    (arguments,) = re.findall(r"--model_args (\S+)", page)
    options = dict(pair.split("=", 1) for pair in arguments.split(","))
    key = yaml_of("frigate.md")["genai"]["edge_vlm"]["api_key"]
    pictures = [png(decode_jpeg(frame)) for frame in frames]
    image: list[Any] = [
        {"type": "image_url", "image_url": {"url": data_uri(data, "image/png")}}
        for data in pictures
    ]
    stamped: list[Any] = []
    for number, part in enumerate(image):
        stamped += [{"type": "text", "text": f"<{number * 0.5:.1f} seconds>"}, part]
    by_path = {"type": "video_url", "video_url": {"url": f"file://{CLIP}"}}
    extra = {
        "media_io_kwargs": {"video": {"num_frames": 4}},
        "chat_template_kwargs": {"enable_thinking": False},
    }
    import openai

    with openai.OpenAI(
        api_key=key,
        base_url=here(server, options["base_url"]),
        max_retries=0,
        timeout=float(options["timeout"]),
    ) as client:
        tokens = []
        for parts, more in ((image, {}), (stamped, {}), ([by_path], extra)):
            content: Any = [*parts, {"type": "text", "text": f"{QUESTION} a or b ?"}]
            done = client.chat.completions.create(
                model="letters",
                messages=[{"role": "user", "content": content}],
                max_tokens=16,
                temperature=0,
                extra_body=more,
            )
            assert done.choices[0].message.content
            assert done.usage is not None
            tokens.append(done.usage.prompt_tokens)
        assert tokens[0] == tokens[1]
