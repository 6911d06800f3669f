"""Which frames of a whole file `ask` shows: the rule that the model was trained on, with no more than
the session holds at once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from edge_vlm.pixels.sampling import FrameRule
from edge_vlm.pixels.video import VideoTimes, clip_times
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits, SessionSettings
from edge_vlm_runtime.session.budget import remembered_tokens


def clip_rule(model: ModelLimits, fps: float | None = None) -> FrameRule | None:
    """What the model was trained on, at another rate if one is given; None where it is not known.

    Raises ValueError for a rate that is none.
    """
    if not model.clip_frames:
        return None
    return FrameRule(num_frames=model.clip_frames, max_fps=fps or model.clip_fps)


def fitting_rule(
    rule: FrameRule,
    probed: VideoTimes,
    settings: SessionSettings,
    model: ModelLimits,
    limits: ServerLimits,
) -> FrameRule:
    """The rule with as many frames as the memory holds of this clip: fewer are spread evenly.

    Raises ConfigError as `video_window` does.
    """
    room = remembered_tokens(settings, model, limits)
    least, most = 1, rule.num_frames
    while least < most:
        middle = (least + most + 1) // 2
        times_s = clip_times(probed, dataclasses.replace(rule, num_frames=middle))
        if _tokens(times_s.tolist(), settings, model) <= room:
            least = middle
        else:
            most = middle - 1
    return dataclasses.replace(rule, num_frames=least)


def _tokens(times_s: Sequence[float], settings: SessionSettings, model: ModelLimits) -> int:
    """What these frames take at most: a token for each character of a stamp, two markers, the cells
    that are kept. The first frame is whole, after the first token of the prompt."""
    cells = model.num_cells
    if settings.policy != "keep_all" and not settings.vision_tokens_per_s:
        cells = math.ceil(settings.keep_ratio * model.num_cells)
    stamps = sum(len(f" {time_s:.1f} ") + 2 for time_s in times_s)
    return stamps + model.num_cells + cells * (len(times_s) - 1)


def shown_text(fits: FrameRule, wanted: FrameRule, probed: VideoTimes) -> str:
    """Which frames those are, in a few words behind their number."""
    if not fits.spreads(probed.end_s):
        return f" ({fits.max_fps:g} a second and the last one)"
    text = f", evenly over {probed.end_s:.1f} s"
    if fits.num_frames < wanted.num_frames:
        meant = len(clip_times(probed, wanted))
        text += f" (the model was trained on {meant}, the memory holds {fits.num_frames})"
    return text
