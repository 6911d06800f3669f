"""What a session remembers is bounded in bytes as well as in tokens."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm_runtime import protocol
from edge_vlm_runtime.cli.common.arguments import add_options, build, options_of
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol.settings import ModelLimits, ServerLimits
from edge_vlm_runtime.session.budget import cache_capacity
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer
from tests.tiny import tiny_bundle, tiny_config, tiny_variant


def test_a_token_costs_its_keys_values_and_feature() -> None:
    language = tiny_config().language
    plain = ModelLimits.from_bundle(EngineBundle.open(tiny_bundle()))
    values = language.num_layers * 2 * language.num_kv_heads * language.head_dim
    assert plain.token_bytes == 4 * values + 4 * language.width
    half = ModelLimits.from_bundle(EngineBundle.open(tiny_variant("ort-fp16")))
    assert half.token_bytes == 2 * values + 4 * language.width


def test_an_endless_stream_stays_within_its_bytes() -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        model = ModelLimits.from_bundle(engines.bundle)
        limits = ServerLimits(max_session_bytes=250 * model.token_bytes)
        assert cache_capacity(model, limits) == 250
        viewer = Viewer(engines, FakeClock(), limits=limits, max_answer_tokens=8)
        context, arena = viewer.context, viewer.arena
        for sequence in range(1, 80):
            viewer.show(sequence)
            features = sum(known.frame.embeds.nbytes for known in context._remembered)
            assert arena.num_bytes + features <= limits.max_session_bytes
        viewer.ask()
        viewer.run()
        assert viewer.of(protocol.ResponseDone)[0].status == "completed"
        assert viewer.of(protocol.MemoryEvicted)
        assert not viewer.drop_reasons()


def test_too_little_memory_is_said_at_once() -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        limits = ServerLimits(max_session_bytes=1 << 10)
        with pytest.raises(ConfigError, match="larger cache"):
            Viewer(engines, FakeClock(), limits=limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"window_tokens": 128},
        {"window_tokens": 0},
        {"window_tokens": 128, "history_turns": 1},
        {"window_tokens": 0, "history_turns": 1},
        {"window_tokens": 128, "subtitles": "subtitle\n0.0 - 1.0 red cube"},
    ],
)
def test_the_longest_answer_is_what_the_window_leaves(changes: dict[str, Any]) -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        for at_once in (True, False):
            viewer = Viewer(engines, FakeClock(), max_answer_tokens=8)
            if not at_once:
                viewer.update(**changes)
            viewer.update(max_output_tokens=10**6, **changes)
            longest = viewer.settings.max_answer_tokens
            assert longest > 8
            assert viewer.settings.window_tokens == changes["window_tokens"]
            model = ModelLimits.from_bundle(engines.bundle)
            if longest < cache_capacity(model, ServerLimits()) // 4:
                with pytest.raises(ConfigError, match=r"window_tokens must be|no room for video"):
                    viewer.update(max_answer_tokens=longest + 1)


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["--session-memory", "512"], {"max_session_bytes": 512 << 20}),
        (["--max-answer-slowdown", "0"], {"max_answer_slowdown": 0.0}),
        (["--resume-grace", "0"], {"resume_grace_s": 0.0}),
    ],
)
def test_limits_on_the_command_line(arguments: list[str], changed: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, {"": options_of(ServerLimits)}, is_checked=True)
    found = build(ServerLimits, parser.parse_args(arguments))
    assert found == dataclasses.replace(ServerLimits(), **changed)
    with pytest.raises(SystemExit):
        parser.parse_args(["--session-memory", "0"])
