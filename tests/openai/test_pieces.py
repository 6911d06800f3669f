"""What the API is made of, piece by piece: forms, stop texts, bytes of tokens, still pictures."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_vlm.errors import FrameDecodeError
from edge_vlm.errors.requests import AnswerFormError, RequestError
from edge_vlm.pixels.frames import decode_picture, shrink_jpeg, still_size
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.constraints import Constraints, choice_grammar, schema_grammar
from edge_vlm_runtime.openai.chat_request import read_chat_request
from edge_vlm_runtime.openai.completion import Reply, Timing
from edge_vlm_runtime.openai.one_shot import OneShots
from edge_vlm_runtime.session.asking.questions import StopText
from edge_vlm_runtime.session.frames import Encoding
from tests.openai.served import png, post, serving
from tests.runtime.cameras.pictures import jpeg, picture
from tests.runtime.server.metrics_events import done as response_done
from tests.runtime.session.viewer import Viewer

# ---- stop texts ------------------------------------------------------------------------------


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_a_text_is_cut_wherever_its_pieces_begin(text: str, stops: list[str], size: int) -> None:
    places = [text.index(stop) for stop in stops if stop in text]
    whole = text[: min(places, default=len(text))]
    cut, said = StopText(stops), ""
    for begin in range(0, len(text), size):
        piece, is_over = cut.push(text[begin : begin + size])
        said += piece
        assert whole.startswith(said)  # nothing has to be taken back
        if is_over:
            break
    else:
        said += cut.flush()
    assert said == whole


# ---- forms -----------------------------------------------------------------------------------


def byte_level() -> Tokenizer:
    """As the published vocabularies are: bytes, and an end."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(alphabet)}
    words["Ġyes"] = len(words)  # " yes"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return Tokenizer(backend)


def test_the_bytes_of_tokens_are_those_of_the_text() -> None:
    tokenizer = byte_level()
    texts = tokenizer.token_bytes()
    for text in ("yes", " yes {}", "größer ✓", "\n\t"):
        assert b"".join(texts[i] for i in tokenizer.encode(text)) == text.encode()
    assert texts[tokenizer.id_of("Ġyes")] == b" yes"
    assert texts[tokenizer.id_of("<|im_end|>")] == b""
    assert sorted(text for text in texts if len(text) == 1) == [bytes([i]) for i in range(256)]


def written(grammar: str, seed: int) -> tuple[str, bool]:
    """What a model says that knows nothing, and whether it could go on."""
    tokenizer = byte_level()
    end = tokenizer.id_of("<|im_end|>")
    constraints = Constraints(tokenizer, [end], end + 1)
    matcher = constraints.matcher(grammar)
    random = np.random.default_rng(seed)
    ids: list[int] = []
    for _ in range(200):
        logits = random.normal(size=end + 1).astype(np.float32)
        matcher.mask(logits)
        token = int(logits.argmax())
        if token == end:
            return tokenizer.decode(ids), False
        matcher.take(token)
        ids.append(token)
        if matcher.is_complete:
            return tokenizer.decode(ids), False
    return tokenizer.decode(ids), True


@pytest.mark.parametrize("seed", range(4))
def test_only_what_the_form_allows_is_written(seed: int) -> None:
    choices = ["yes", "yes, twice", 'a "quote"', "größer\n"]
    text, is_cut = written(choice_grammar(choices), seed)
    assert text.removeprefix(" ") in choices
    assert not is_cut
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3}
    text, is_cut = written(schema_grammar(schema), seed)
    assert not set(text) - set("[]truefalse, ")


@pytest.mark.parametrize(
    "schema", [{"type": "nothing"}, {"$ref": "#/$defs/none"}, {"$ref": "https://example.org/a"}]
)
def test_a_schema_that_is_none_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(AnswerFormError):
        written(schema_grammar(schema), 0)
    for choices in ([], [""]):
        with pytest.raises(AnswerFormError):
            choice_grammar(choices)


# ---- still pictures --------------------------------------------------------------------------


def encoded(image: Any, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_still_pictures_of_every_kind_are_read() -> None:
    rgb = picture(1)
    assert (decode_picture(png(rgb)) == rgb).all()
    assert still_size(png(rgb)) == (48, 48)
    image = Image.fromarray(rgb)
    palette = image.convert("P", palette=Image.Palette.ADAPTIVE)
    assert (decode_picture(encoded(palette, "GIF")) == np.asarray(palette.convert("RGB"))).all()
    seen = image.convert("RGBA")
    seen.putalpha(0)
    assert (decode_picture(encoded(seen, "PNG")) == 255).all()  # laid on white
    grey = image.convert("L")
    assert (decode_picture(encoded(grey, "PNG")) == np.asarray(grey)[..., None]).all()
    for kind in ("PNG", "WEBP", "GIF"):
        assert decode_picture(shrink_jpeg(encoded(image, kind), 2000)).shape[2] == 3
        with pytest.raises(FrameDecodeError, match="broken or cut off"):
            decode_picture(encoded(image, kind)[:60])
    deep = Image.fromarray(rgb[..., 0].astype(np.uint16) * 256 + 77)
    assert (decode_picture(encoded(deep, "PNG")) == rgb[..., :1]).all()
    for kind in ("BMP", "TIFF"):
        with pytest.raises(FrameDecodeError, match="JPEG, PNG, WebP or GIF"):
            still_size(encoded(image, kind))


def test_a_live_session_drops_no_picture_of_the_conversation() -> None:
    """Alike, at once, older than it takes and faster than its rate: none of that holds for it."""
    viewer = Viewer(delivery="live", fps_cap=1.0, max_frame_age_s=0.1)
    viewer.put(1, jpeg(1), 0.0, Encoding.STILL)
    viewer.put(2, png(picture(2)), 0.001, Encoding.STILL)
    viewer.put(3, png(picture(2)), 0.002, Encoding.STILL)
    viewer.put(4, jpeg(4), 5.0)
    viewer.clock.pass_s(0.05)
    viewer.put(5, jpeg(5), 7.0)  # the newest wins
    viewer.clock.pass_s(1.0)
    viewer.run()
    assert {e.frame_sequence for e in viewer.of(protocol.FrameAccepted)} == {1, 2, 3}
    assert viewer.drop_reasons() == {4: "busy", 5: "stale"}


def test_the_space_that_an_answer_begins_with_is_not_its_own() -> None:
    done = response_done("r1", "completed", 0.1)
    done.text = " a red cat"
    whole = Reply(model="demo").whole(done, Timing(received_s=0.0))
    assert whole["choices"][0]["message"]["content"] == "a red cat"


def test_a_bug_of_ours_is_told_without_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a secret")

    body = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
    with serving() as server:
        monkeypatch.setattr(OneShots, "plan", fail)
        reply = post(server, body)
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "E-INTERNAL"
        assert reply.json()["error"]["type"] == "server_error"
        assert "secret" not in reply.text
        monkeypatch.undo()
        assert post(server, body).status_code == 200


# ---- bodies ----------------------------------------------------------------------------------

WORDS = ["user", "text", "image_url", "video_url", "data:,x", "file:///a", "json_schema"]
KEYS = ["type", "text", "url", "role", "content", "image_url", "video_url", "choice", "json"]
PLAIN = st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.text(max_size=8)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    PLAIN | NUMBERS | st.sampled_from(WORDS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from(
    [
        *("messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n", "tools"),
        *("tool_choice", "response_format", "guided_decoding", "edge_vlm", "media_io_kwargs"),
        *("stream_options", "user", "guided_json", "logit_bias"),
    ]
)


@given(st.dictionaries(FIELDS, VALUES, max_size=4), VALUES)
def test_any_body_is_read_or_refused_by_name(changes: dict[str, Any], content: Any) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": content}], **changes}
    try:
        request = read_chat_request(json.dumps(body).encode())
    except RequestError as error:
        assert error.param is None or isinstance(error.param, str)
        assert len(str(error)) < 2000
    else:
        assert request.conversation.turns[-1].text.strip()
