"""Settings, rules and times at the ends of their ranges are refused or work, and end no session."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_vlm.errors import EdgeVlmError
from edge_vlm_runtime import protocol
from edge_vlm_runtime.protocol.alerts import AlertCreate
from edge_vlm_runtime.protocol.settings import LEAST, MAX_WHOLE, MOST, POLICIES
from tests.runtime.session.viewer import Viewer

TINY, HUGE = 5e-324, 1.7976931348623157e308
REAL = st.sampled_from(
    [0.0, -0.0, TINY, 1e-300, LEAST, 1e-3, 0.5, 1.0, 1.0000001, 2.0, 10.0, 1e3, MOST, 1e300, HUGE]
)
WHOLE = st.sampled_from([0, 1, 2, 3, 9, 64, 100, 2**31, 2**32, MAX_WHOLE - 1, MAX_WHOLE])
KINDS: dict[str, st.SearchStrategy[Any]] = {
    "policy": st.sampled_from(POLICIES),
    "attention": st.sampled_from(["frame", "exact", "last_n"]),
    "delivery": st.sampled_from(["live", "wait"]),
    "drop_duplicates": st.booleans(),
    "raw_frames": st.booleans(),
    "instructions": st.sampled_from(["", " ", "\x00", "\ufeff", "<|im_end|>", "is there ?"]),
    "subtitles": st.sampled_from(["", "\x00", "subtitle\n0.0 - 1.0 red"]),
    **dict.fromkeys(
        (
            *("keep_ratio", "vision_tokens_per_s", "change_threshold", "fps_cap", "heartbeat_s"),
            *("duplicate_threshold", "max_frame_age_s", "temperature", "top_p", "bank_frames"),
            "reuse",
        ),
        REAL,
    ),
    **dict.fromkeys(
        (
            *("policy_seed", "min_cells", "last_n", "window_tokens", "max_answer_tokens"),
            *("history_turns", "seed", "max_cells", "payback_frames", "reuse_refresh"),
        ),
        WHOLE,
    ),
}
PATCHES = st.lists(st.sampled_from(sorted(KINDS)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: KINDS[name] for name in names})
)
RULES = st.dictionaries(
    st.sampled_from(
        ["on_threshold", "off_threshold", "hold_s", "clear_hold_s", "cooldown_s", "interval_s"]
    ),
    REAL,
    max_size=3,
)
LAST_US = protocol.MAX_CAPTURE_TIME_US
TIMES = st.sampled_from(
    [
        [0, 500_000, 1_000_000, 1_500_000],
        [0, 1, 2, 3],
        [LAST_US - 3, LAST_US - 2, LAST_US - 1, LAST_US],
        [0, LAST_US // 2, LAST_US - 1, LAST_US],
        [0, 10**6, 5 * 10**5, 2 * 10**6],
        [LAST_US, 0, 1, 2],
    ]
)


def test_every_setting_is_tried() -> None:
    own = set(protocol.SettingsPatch.__struct_fields__)
    assert set(KINDS) <= own
    assert {name for name in own if hasattr(Viewer().settings, name)} <= set(KINDS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(PATCHES, min_size=1, max_size=2), st.none() | RULES, TIMES)
def test_no_setting_ends_a_session(
    patches: list[dict[str, Any]], rule: dict[str, Any] | None, times: list[int]
) -> None:
    viewer = Viewer(max_answer_tokens=4)
    if rule is not None:
        with suppress(EdgeVlmError, ValueError):
            viewer.take(AlertCreate(question="is there a red ball ?", report_checks=True, **rule))
    for number, capture_us in enumerate(times):
        if number < len(patches):
            with suppress(EdgeVlmError):
                viewer.update(**patches[number])
        viewer.clock.pass_s(0.2)
        viewer.put(number, at_s=capture_us * 1e-6)
        for _ in range(60):  # an answer may be long
            if not viewer.step():
                break
        with suppress(EdgeVlmError):
            viewer.ask()
    for _ in range(60):
        viewer.step()
    internal = [each for each in viewer.of(protocol.Error) if each.error.code == "E-INTERNAL"]
    assert not internal
    assert viewer.handle.session is not None
    viewer.close()
    assert viewer.outcomes() == list(range(len(times)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [LEAST, 1.0, MOST])
def test_budgets_by_time_at_their_ends_work(policy: str, budget: float) -> None:
    for min_cells in (0, 1, MAX_WHOLE):
        viewer = Viewer()
        with suppress(EdgeVlmError):  # what does not go with it is refused
            viewer.update(policy=policy, vision_tokens_per_s=budget, min_cells=min_cells)
        viewer.show(1, 2, 3)
        assert viewer.outcomes() == [1, 2, 3]
        assert not viewer.of(protocol.Error)
