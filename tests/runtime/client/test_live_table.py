from __future__ import annotations

from edge_vlm_runtime import protocol
from edge_vlm_runtime.client.live_table import LiveGauges
from edge_vlm_runtime.client.terminal import answer_line


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def accepted(number: int, kept: int = 4) -> protocol.FrameAccepted:
    return protocol.FrameAccepted(
        frame_sequence=number,
        time_s=number * 0.5,
        cells_seen=16,
        cells_kept=kept,
        kept_cells=list(range(kept)),
        stage_ms={},
        queue_ms=1.0,
        age_ms=20.0,
        kv_tokens=77,
        in_memory=True,
    )


def done(
    ttft_s: float | None, tokens_per_s: float | None, finish_reason: str = "stop"
) -> protocol.ResponseDone:
    return protocol.ResponseDone(
        response_id="response_1",
        status="completed",
        finish_reason=finish_reason,
        text="red",
        usage=protocol.Usage(vision_tokens=77, text_tokens=9, output_tokens=3),
        ttft_s=ttft_s,
        tokens_per_s=tokens_per_s,
        newest_frame=protocol.NewestFrame(frame_sequence=1, time_s=0.5, age_s=0.0),
        kv_tokens=89,
        time_offset_s=0.0,
    )


def stats(memory_bytes: int | None, power_watts: float | None) -> protocol.SessionStats:
    return protocol.SessionStats(
        frames_received=9,
        frames_processed=4,
        frames_dropped={"busy": 5},
        fps_in=2.0,
        fps_processed=1.5,
        cells_seen=64,
        cells_kept=16,
        frames_in_memory=4,
        kv_tokens=123,
        kv_capacity_tokens=512,
        questions_waiting=0,
        ttft_s=None,
        memory_bytes=memory_bytes,
        power_watts=power_watts,
    )


def test_a_cut_answer_says_so_and_how_to_have_the_rest() -> None:
    assert answer_line(done(None, None, "length")) == (
        "red  [cut at 3 tokens: raise --max-answer-tokens]"
    )
    assert answer_line(done(None, None)) == "red"


def test_before_anything_happened() -> None:
    rows = dict(LiveGauges(Clock()).rows())
    assert list(rows) == [
        *("fps in", "processed", "dropped", "cells kept", "recomputed", "frame age"),
        *("TTFT", "tokens/s", "KV", "memory", "power"),
    ]
    assert rows["fps in"] == "0.0"
    assert rows["dropped"] == "none"
    assert {
        rows[name] for name in ("cells kept", "recomputed", "TTFT", "KV", "memory", "power")
    } == {"-"}


def test_a_running_stream() -> None:
    clock = Clock()
    gauges = LiveGauges(clock)
    for number in range(1, 5):
        clock.now_s += 0.5
        gauges.sent()
        gauges.event(accepted(number))
    gauges.event(protocol.FrameDropped(frame_sequence=9, reason="rate"))
    gauges.event(protocol.FrameDropped(frame_sequence=10, reason="busy"))
    gauges.event(protocol.FrameDropped(frame_sequence=11, reason="busy"))
    gauges.event(done(0.05, 33.3))
    gauges.event(stats(3 << 20, 7.25))
    assert dict(gauges.rows()) == {
        "fps in": "2.0",
        "processed": "4 of 4, 1.5 a second",
        "dropped": "2 busy, 1 rate",
        "cells kept": "25% of the last 4",
        "recomputed": "100% of the cells",
        "frame age": "20 ms",
        "TTFT": "50 ms",
        "tokens/s": "33",
        "KV": "123 / 512 tokens, 4 frames",
        "memory": "3 MiB",
        "power": "7.2 W",
    }


def test_a_camera_that_is_gone_shows() -> None:
    clock = Clock()
    gauges = LiveGauges(clock)
    for number in range(1, 20):
        clock.now_s += 0.1
        gauges.sent()
        gauges.event(accepted(number))
    assert dict(gauges.rows())["fps in"] == "10.0"
    clock.now_s += 60.0
    rows = dict(gauges.rows())
    assert rows["fps in"] == "0.0"
    assert rows["frame age"] == "60.0 s"


def test_an_answer_without_a_word_keeps_the_figures_of_the_last_one() -> None:
    gauges = LiveGauges(Clock())
    gauges.event(done(0.05, None))
    gauges.event(done(None, None))
    rows = dict(gauges.rows())
    assert rows["TTFT"] == "50 ms"
    assert rows["tokens/s"] == "-"
