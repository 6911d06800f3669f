"""Subtitles are read from SRT and WebVTT and written as Molmo2's prompt has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.text.prompt import RELEASED, PromptFormat
from edge_vlm.text.subtitles import Subtitle, near_frames, read_subtitles, subtitle_text
from edge_vlm.text.tokenizer import Tokenizer
from tests.preprocessing_record import PUBLISHED_4B

SRT = """1
00:00:01,000 --> 00:00:02,540
<i>Hello</i>
there, {\\an8}you

2
01:00:04,250 --> 01:00:05,000
2 < 3, she said
"""
VTT = """WEBVTT

NOTE nobody reads this

00:01.000 --> 00:02.540 align:start
Hello <c.loud>there</c>, <00:02.000>you
"""
HELLO = Subtitle(1.0, 2.54, "Hello there, you")


def write(folder: Path, text: str | bytes, name: str = "a.srt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_both_forms_are_read_without_their_markup(tmp_path: Path) -> None:
    late = Subtitle(3604.25, 3605.0, "2 < 3, she said")
    assert read_subtitles(write(tmp_path, SRT)) == [HELLO, late]
    assert read_subtitles(write(tmp_path, "\ufeff" + SRT)) == [HELLO, late]
    assert read_subtitles(write(tmp_path, SRT.replace("\n", "\r\n"))) == [HELLO, late]
    assert read_subtitles(write(tmp_path, VTT, "a.vtt")) == [HELLO]


def test_the_published_form() -> None:
    entries = [HELLO, Subtitle(3604.25, 3605.0, "Bye")]
    assert subtitle_text(entries) == "subtitle\n1.0 - 2.5 Hello there, you\n3604.2 - 3605.0 Bye"
    assert subtitle_text([]) == ""


@pytest.mark.parametrize(
    ("time_s", "stays"), [(0.0, True), (-0.1, False), (1.5, True), (3.5, True), (3.6, False)]
)
def test_only_what_a_frame_comes_near_stays(time_s: float, stays: bool) -> None:
    assert near_frames([HELLO], [-9.0, time_s, 99.0]) == ([HELLO] if stays else [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not subtitles"),
        ("hello", "not subtitles"),
        (SRT.replace("you", "Z\xfcrich").encode("latin-1"), "can't decode"),
        ("1\n00:00:01,000 --> 00:00:02,000\n<i></i>\n\n", "no subtitle in it"),
        ("[Script Info]\nScriptType: v4.00+\n\n[Events]\n", "another form"),
    ],
)
def test_what_is_none_is_named(tmp_path: Path, text: str | bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        read_subtitles(write(tmp_path, text))
    assert str(caught.value.where) == str(tmp_path / "a.srt")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_subtitles(tmp_path / "b.srt")


@pytest.mark.skipif(
    not PUBLISHED_4B.is_dir(), reason="needs the published 4B folder beside the clone"
)
def test_they_stand_where_the_published_template_has_them() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).from_string(
        (PUBLISHED_4B / "chat_template.jinja").read_text()
    )
    question = "Is it a dog?"
    content = [{"type": "video"}, {"type": "text", "text": question}]
    messages = [
        {"role": "subtitle", "content": subtitle_text([HELLO])},
        {"role": "user", "content": content},
    ]
    written = template.render(messages=messages, add_generation_prompt=True)
    prompt = PromptFormat(Tokenizer.from_file(PUBLISHED_4B / "tokenizer.json"), RELEASED)
    ours = [*prompt.subtitle_ids(subtitle_text([HELLO])), *prompt.question_ids(question)]
    assert prompt.tokenizer.encode(written)[1:] == ours
