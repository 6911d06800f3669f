"""Subtitles of a film, as they stand in a Molmo2 prompt: behind the video, before the first turn.

The published form is the word `subtitle` and a line for each entry, `START - END TEXT`, in seconds
with one decimal; entries that no sampled frame comes near are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_vlm.errors import ConfigError
from edge_vlm.pixels.film.opening import av, decoding_errors, local_file, reason_of

FORMATS = ("srt", "subrip", "webvtt")
NEAR_S = 1.0
"""An entry stays if a frame is shown so shortly before it, during it or after it."""
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|<\d[\d:.]*>|\{\\[^{}]*\}")
"""Of letters and colours, of karaoke, and of places on the screen."""


@dataclass(frozen=True)
class Subtitle:
    """Shown from `start_s` to `end_s`, seconds from the film's begin."""

    start_s: float
    end_s: float
    text: str
    """One line."""


def read_subtitles(path: Path) -> list[Subtitle]:
    """The entries of an SRT or WebVTT file that say something, in order.

    Raises ConfigError for what is none or is empty, MissingExtraError.
    """
    remedy = "give an SRT or WebVTT file in UTF-8"
    if not path.is_file():
        raise ConfigError("no such file", where=path)
    found: list[Subtitle] = []
    try:
        with av().open(local_file(path)) as container:
            stream = next(iter(container.streams.subtitles), None)
            codec = None if stream is None else stream.codec_context.name
            if codec not in FORMATS:
                what = "not subtitles" if codec is None else f"subtitles of another form ({codec})"
                raise ConfigError(what, where=path, remedy=remedy)
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    text = " ".join(_MARKUP.sub("", bytes(packet).decode()).split())
                    start_s = float(packet.pts * packet.time_base)
                    end_s = start_s + float((packet.duration or 0) * packet.time_base)
                    if text:
                        found.append(Subtitle(start_s, end_s, text))
    except decoding_errors() as error:
        raise ConfigError(
            f"not subtitles that can be read ({reason_of(error)})", where=path, remedy=remedy
        ) from error
    if not found:
        raise ConfigError("there is no subtitle in it", where=path, remedy=remedy)
    return sorted(found, key=lambda entry: (entry.start_s, entry.end_s))


def near_frames(entries: Iterable[Subtitle], times_s: Sequence[float]) -> list[Subtitle]:
    """Those that a frame at one of these times comes near."""
    return [
        entry
        for entry in entries
        if any(entry.start_s - NEAR_S <= time_s <= entry.end_s + NEAR_S for time_s in times_s)
    ]


def subtitle_text(entries: Iterable[Subtitle]) -> str:
    """As it stands in a prompt; empty for none."""
    lines = [f"{entry.start_s:.1f} - {entry.end_s:.1f} {entry.text}" for entry in entries]
    return "\n".join(["subtitle", *lines]) if lines else ""
