"""Chat completions through OpenAI's own SDK, with the demo model and its clip."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from edge_vlm.pixels.frames import decode_jpeg
from edge_vlm_runtime.server.app import Server
from tests.openai.letters import letters_bundle
from tests.openai.served import (
    CLIP,
    client_of,
    clip_frames,
    data_uri,
    picture_part,
    png,
    serving,
    user,
)
from tests.published_folder import image_bundle

if TYPE_CHECKING:
    import openai

FIGURES = {
    *("time_to_first_token_ms", "generation_time_ms", "queue_time_ms"),
    *("mean_itl_ms", "tokens_per_second"),
}
NOW = "What is there now?"
TRUTH = "orange mushroom, yellow bicycle, green dog, purple balloon"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def ask(
    client: openai.OpenAI, messages: Any, own: dict[str, Any] | None = None, **more: Any
) -> Any:
    extra = {"edge_vlm": own} if own else {}
    return client.chat.completions.create(
        model="demo", messages=messages, extra_body=extra | more.pop("extra_body", {}), **more
    )


def text_of(completion: Any) -> str:
    return str(completion.choices[0].message.content)


def video_part(data: bytes) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_uri(data, "video/mp4")}}


def first_frames() -> list[bytes]:
    """What had been seen of the clip when it was asked what there is."""
    return clip_frames()[:11]


def test_the_model_is_listed_with_its_length(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "demo"
    found = client.models.retrieve("demo")
    assert found.model_extra is not None
    assert found.model_extra["max_model_len"] > 256
    import openai

    with pytest.raises(openai.NotFoundError, match="no model"):
        client.models.retrieve("gpt-4o")


def test_pictures_of_a_clip_are_a_video(client: openai.OpenAI) -> None:
    """The answer of the live stream about the same frames."""
    done = ask(client, user(NOW, *map(picture_part, first_frames())))
    assert text_of(done) == TRUTH
    usage = done.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens > 100
    assert set(usage.model_extra) >= FIGURES
    assert all(usage.model_extra[name] >= 0 for name in FIGURES)
    assert done.choices[0].finish_reason == "stop"


def test_a_stream_says_the_same_in_pieces(client: openai.OpenAI) -> None:
    messages = user(NOW, *map(picture_part, first_frames()))
    chunks = list(ask(client, messages, stream=True, stream_options={"include_usage": True}))
    pieces = [
        c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content
    ]
    assert "".join(pieces) == TRUTH
    assert len(pieces) > 4
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens > 0) == ([], True)
    assert set(chunks[-1].usage.model_extra) >= FIGURES
    assert len({chunk.id for chunk in chunks}) == 1
    without = list(ask(client, messages, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_a_video_is_sampled_as_it_is_played(client: openai.OpenAI) -> None:
    whole = ask(client, user("Is there a mushroom?", video_part(CLIP.read_bytes())))
    few = ask(
        client,
        user("Is there a mushroom?", video_part(CLIP.read_bytes())),
        extra_body={"media_io_kwargs": {"video": {"num_frames": 4}}},
    )
    assert few.usage.prompt_tokens_details.image_tokens > 0
    assert (
        few.usage.prompt_tokens_details.image_tokens
        < whole.usage.prompt_tokens_details.image_tokens / 2
    )


def test_fewer_cells_are_fewer_tokens(client: openai.OpenAI) -> None:
    messages = user(NOW, *map(picture_part, first_frames()))
    tokens = [
        ask(client, messages, own={"keep_ratio": ratio, "policy": policy}).usage.prompt_tokens
        for ratio, policy in ((0.25, "stream"), (0.5, "random"), (1.0, "keep_all"))
    ]
    assert tokens == sorted(tokens)
    assert tokens[0] < 0.7 * tokens[2]


def test_times_come_from_the_request(client: openai.OpenAI) -> None:
    """An answer about a time names that of the request, however it is said."""
    frames = clip_frames()[:15]
    question = "When did the mushroom appear?"
    assert text_of(ask(client, user(question, *map(picture_part, frames)))) == "at 1.5 s"
    frames = frames[:14]
    times = [1.0 + 0.5 * number for number in range(len(frames))]
    stated = ask(client, user(question, *map(picture_part, frames)), own={"frame_times": times})
    stamped: list[Any] = []
    for time_s, frame in zip(times, frames, strict=True):
        stamped += [f"<{time_s:.1f} seconds>", picture_part(frame)]
    said = ask(client, user(*stamped, question))
    assert text_of(stated) == text_of(said) == "at 2.5 s"


def test_text_alone_is_answered(client: openai.OpenAI) -> None:
    done = ask(client, [{"role": "user", "content": "Hi"}])
    assert done.choices[0].finish_reason in ("stop", "length")
    assert done.usage.prompt_tokens_details.image_tokens == 0


def test_a_png_is_seen_as_its_pixels_are(client: openai.OpenAI) -> None:
    """Losslessly repacked, the same picture: the same answer to each question."""
    jpeg = first_frames()[-1]
    lossless = png(decode_jpeg(jpeg))
    for question in (NOW, "Where is the mushroom now?"):
        answers = [
            text_of(ask(client, user(question, picture_part(data, kind))))
            for data, kind in ((jpeg, "image/jpeg"), (lossless, "image/png"))
        ]
        assert answers[0] == answers[1]


def test_a_choice_is_one_of_the_choices(client: openai.OpenAI) -> None:
    frames = [picture_part(frame) for frame in first_frames()]
    for question, wanted in (("Is there a mushroom?", "yes"), ("Is there a boat?", "no")):
        done = ask(
            client,
            user(question, *frames),
            extra_body={"guided_decoding": {"choice": ["yes", "no"]}},
        )
        assert text_of(done) == wanted
        assert done.usage.completion_tokens == 1
    other = ask(client, user(NOW, *frames), extra_body={"guided_choice": ["red", "a blue car"]})
    assert text_of(other) in ("red", "a blue car")


def test_stop_texts_end_an_answer_before_them(client: openai.OpenAI) -> None:
    messages = user(NOW, *map(picture_part, first_frames()))
    cut = ask(client, messages, stop=[" bicycle", "dog"])
    assert (text_of(cut), cut.choices[0].finish_reason) == ("orange mushroom, yellow", "stop")
    chunks = ask(client, messages, stop=", yellow", stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "orange mushroom"


def test_an_answer_that_is_cut_says_so(client: openai.OpenAI) -> None:
    messages = user(NOW, *map(picture_part, first_frames()))
    for name in ("max_tokens", "max_completion_tokens"):
        limit: dict[str, Any] = {name: 2}
        done = ask(client, messages, **limit)
        assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (2, "length")
    roomy = ask(client, messages, max_tokens=100_000)
    assert text_of(roomy) == TRUTH


def test_a_seed_repeats_a_draw(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        return text_of(ask(client, user(NOW), temperature=2.0, seed=seed, max_tokens=12))

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(6)}) > 1


def test_earlier_turns_and_a_system_message_are_read(client: openai.OpenAI) -> None:
    short = ask(client, user(NOW))
    longer = ask(
        client,
        [
            {"role": "system", "content": "what is there now?"},
            {"role": "user", "content": "Is there a mushroom?"},
            {"role": "assistant", "content": "yes"},
            *user(NOW),
        ],
    )
    assert longer.usage.prompt_tokens > short.usage.prompt_tokens + 10


def test_what_is_left_aside_is_said(server: Server, client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    raw = client.chat.completions.with_raw_response.create(
        model="demo",
        messages=cast(Any, user(NOW)),
        tools=tools,
        tool_choice="auto",
        frequency_penalty=0.5,
        user="me",
    )
    named = {"user", "frequency_penalty", "tools", "tool_choice"}
    assert set(raw.headers["x-edge-vlm-ignored"].split(", ")) == named
    own: Any = raw.parse().model_extra
    assert set(own["edge_vlm"]["ignored"]) == named


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    """Of a model whose vocabulary can write JSON, with random weights."""
    bundle: Path = letters_bundle(tmp_path_factory.mktemp("letters"))
    with serving(bundle) as running, client_of(running) as made:
        yield made


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "seen": {"type": "boolean"},
        "level": {"type": "integer", "minimum": 0, "maximum": 2},
        "what": {"enum": ["cat", "dog"]},
        "list": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["seen", "level", "what", "list"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_an_answer_keeps_to_a_schema(letters: openai.OpenAI, seed: int | None) -> None:
    """The likeliest tokens, and those drawn at random, of a model that knows nothing of JSON."""
    done = letters.chat.completions.create(
        model="letters",
        messages=cast(Any, user("?")),
        max_tokens=120,
        temperature=0 if seed is None else 1.5,
        seed=seed,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "it", "schema": SCHEMA, "strict": True},
        },
    )
    assert done.choices[0].finish_reason == "stop"
    value = json.loads(done.choices[0].message.content or "")
    assert set(value) == {"seen", "level", "what", "list"}
    assert isinstance(value["seen"], bool)
    assert value["level"] in (0, 1, 2)
    assert value["what"] in ("cat", "dog")
    assert set(value["list"]) <= {"a", "b"}


def test_a_vocabulary_that_cannot_write_a_form_says_so(client: openai.OpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="vocabulary cannot write"):
        ask(client, user(NOW), response_format={"type": "json_object"})
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        ask(client, user(NOW), extra_body={"guided_json": {"type": "nothing"}})


@pytest.fixture(scope="module")
def close_up() -> Iterator[openai.OpenAI]:
    """Of a model that reads still pictures in full detail, too."""
    with serving(image_bundle()) as running, client_of(running) as made:
        yield made


def test_a_single_picture_is_looked_at_closely_where_the_model_can(close_up: openai.OpenAI) -> None:
    """Unless the client says that a small view will do; several are a video."""
    (model,) = close_up.models.list().data
    picture = clip_frames()[0]

    def tokens(*parts: Any, **own: Any) -> int:
        done: Any = close_up.chat.completions.create(
            model=model.id,
            messages=cast(Any, user(*parts, "?")),
            max_tokens=2,
            extra_body={"edge_vlm": own},
        )
        found: int = done.usage.prompt_tokens_details.image_tokens
        return found

    close = tokens(picture_part(picture))
    video = tokens(picture_part(picture, detail="low"))
    assert close > video
    assert tokens(picture_part(picture), detail="video") == video
    assert tokens(picture_part(picture, detail="low"), detail="snapshot") == close
    assert tokens(picture_part(picture), detail="both") > close
    two = [picture_part(frame) for frame in clip_frames()[:2]]
    assert tokens(*two) == tokens(*two, detail="video")
