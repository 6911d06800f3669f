"""Which frames of a whole file `ask` shows: the rule that the model was trained on, with no more of
them than the session holds at once, and the subtitles near them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_vlm.errors import ConfigError
from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import VideoTimes, clip_times
from edge_vlm.text.subtitles import Subtitle, near_frames, subtitle_text
from edge_vlm_runtime.client.terminal import no_more_fit
from edge_vlm_runtime.protocol.base import MAX_SUBTITLES
from edge_vlm_runtime.protocol.messages import VideoRoom
from edge_vlm_runtime.protocol.settings import ModelLimits, SessionSettings
from edge_vlm_runtime.protocol.typed import Settings

if TYPE_CHECKING:
    from edge_vlm_runtime.client.client import Client


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What is shown of a file."""

    times_s: list[float]
    said: str
    """Which frames those are, in a few words behind their number."""


def clip_rule(model: ModelLimits, fps: float | None = None) -> FrameRule | None:
    """What the model was trained on, at another rate if one is given; None if it is not known."""
    if not model.clip_frames:
        return None
    return FrameRule(num_frames=model.clip_frames, max_fps=fps or model.clip_fps)


async def choose(
    client: Client, rule: FrameRule, probed: VideoTimes, subtitles: Sequence[Subtitle]
) -> Chosen:
    """As many frames as the session holds beside the subtitles, which it is told.

    Raises ConfigError when they leave too little room.
    """
    model = client.created.model.limits
    room = await _room(client, {})
    near: list[Subtitle] = []
    while True:
        fits = fitting_rule(rule, probed, room.tokens, client.settings, model)
        times_s: list[float] = clip_times(probed, fits).tolist()
        if not subtitles:
            break
        near = near_frames(subtitles, times_s)
        text = subtitle_text(near)
        if len(text) > MAX_SUBTITLES:
            raise ConfigError(
                f"the subtitles near the frames have {len(text):,} characters, and a prompt takes "
                f"{MAX_SUBTITLES:,}",
                where="subtitles",
                remedy="give a file with fewer of them",
            )
        room = await _room(client, {"subtitles": text})
        if fits.num_frames == 1 or num_tokens(times_s, client.settings, model) <= room.tokens:
            break
    said = _said(fits, rule, probed, room, model)
    if subtitles:
        said += f", {len(near)} of {len(subtitles)} subtitles"
    return Chosen(times_s=times_s, said=said)


async def _room(client: Client, settings: Settings) -> VideoRoom:
    """How much video the session shows at most under these settings."""
    room = (await client.update(settings)).video
    assert room is not None, "a server that tells its frame rule tells this, too"
    return room


def fitting_rule(
    rule: FrameRule, probed: VideoTimes, room: int, settings: SessionSettings, model: ModelLimits
) -> FrameRule:
    """The rule with as many frames of this clip as fit into `room` tokens."""
    least, most = 1, rule.num_frames
    while least < most:
        middle = (least + most + 1) // 2
        times_s = clip_times(probed, dataclasses.replace(rule, num_frames=middle))
        if num_tokens(times_s.tolist(), settings, model) <= room:
            least = middle
        else:
            most = middle - 1
    return dataclasses.replace(rule, num_frames=least)


def num_tokens(times_s: Sequence[float], settings: SessionSettings, model: ModelLimits) -> int:
    """What these frames take at most: a token for each character of a stamp, two markers, the cells
    that are kept. The first frame is whole, after the first token of the prompt."""
    cells = model.num_cells
    if settings.policy != "keep_all" and not settings.vision_tokens_per_s:
        cells = math.ceil(settings.keep_ratio * model.num_cells)
    stamps = sum(len(f" {time_s:.1f} ") + 2 for time_s in times_s)
    return stamps + model.num_cells + cells * (len(times_s) - 1)


def _said(
    fits: FrameRule, wanted: FrameRule, probed: VideoTimes, room: VideoRoom, model: ModelLimits
) -> str:
    if not fits.spreads(probed.end_s):
        return f" ({fits.max_fps:g} a second and the last one)"
    text = f", evenly over {probed.end_s:.1f} s"
    if fits.num_frames < wanted.num_frames:
        meant = f"{len(clip_times(probed, wanted))}"
        if wanted.max_fps == model.clip_fps:
            meant = f"the model was trained on {meant}"
        else:
            meant += f" at {wanted.max_fps:g} a second"
        text += f" ({meant}; {no_more_fit(room)})"
    return text
