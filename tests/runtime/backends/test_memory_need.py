"""Memory is compared with what there is before a graph is loaded."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.formats.bundle import EngineBundle
from edge_vlm.memory import run_bytes
from edge_vlm_runtime.inference import bundle_model
from edge_vlm_runtime.protocol.settings import ServerLimits, SessionSettings
from edge_vlm_runtime.server import memory_need
from edge_vlm_runtime.server.app import Server
from edge_vlm_runtime.server.memory_need import MemoryNeed, require_memory
from edge_vlm_runtime.session.budget import default_settings
from tests.tiny import tiny_bundle

LIMITS = ServerLimits(max_question_tokens=64)


@pytest.fixture(scope="module")
def bundle() -> EngineBundle:
    return EngineBundle.open(tiny_bundle())


@pytest.fixture(scope="module")
def settings(bundle: EngineBundle) -> SessionSettings:
    return default_settings(bundle, LIMITS)


def test_its_parts(bundle: EngineBundle, settings: SessionSettings) -> None:
    need = MemoryNeed.of(bundle, settings, LIMITS)
    files = (bundle.path / "graphs").iterdir()
    assert need.weights == sum(file.stat().st_size for file in files)
    small = MemoryNeed.of(bundle, settings, dataclasses.replace(LIMITS, kv_capacity_tokens=300))
    assert small.cache < need.cache
    assert small.weights == need.weights
    exact = MemoryNeed.of(bundle, settings.changed({"attention": "exact"}), LIMITS)
    language, spec = bundle.config.language, bundle.specs["llm"]
    at_once = spec.dims["s"].max  # all frames in one run, and nothing before them
    assert exact.prefill == run_bytes(language, spec, at_once, 0)
    assert need.most == need.least + 3 * need.cache


def test_cameras_have_their_caches_from_the_start(
    bundle: EngineBundle, settings: SessionSettings
) -> None:
    need = MemoryNeed.of(bundle, settings, LIMITS)
    cameras = MemoryNeed.of(bundle, settings, LIMITS, num_cameras=3)
    assert cameras.least == need.least + 2 * need.cache
    assert cameras.most == need.most + 3 * need.cache
    with pytest.raises(ConfigError, match="serving 3 cameras needs about"):
        require_memory(bundle, settings, LIMITS, free=need.least, num_cameras=3)


def test_scores_of_a_whole_mask_grow_with_the_square(bundle: EngineBundle) -> None:
    language, spec = bundle.config.language, bundle.specs["llm"]
    tensors = tuple(
        dataclasses.replace(t, name="mask_rule") if t.name == "attn_bias" else t
        for t in spec.inputs
    )
    chunked = dataclasses.replace(spec, inputs=tensors)
    whole, few = (
        [run_bytes(language, form, size, 0) for size in (1_000, 10_000, 100_000)]
        for form in (spec, chunked)
    )
    assert whole[2] / whole[1] > 90
    assert few[2] / few[1] < 11
    assert few[0] < whole[0]


def test_too_little_is_refused_and_short_is_said(
    bundle: EngineBundle, settings: SessionSettings, caplog: pytest.LogCaptureFixture
) -> None:
    need = MemoryNeed.of(bundle, settings, LIMITS)
    with caplog.at_level(logging.WARNING):
        require_memory(bundle, settings, LIMITS, free=need.most)
        assert not caplog.records
        require_memory(bundle, settings, LIMITS, free=need.least + need.cache)
    (record,) = caplog.records
    assert "4 sessions" in record.getMessage()
    assert "2 would fit" in record.getMessage()
    with pytest.raises(ConfigError, match=r"needs about .* lower --kv-tokens"):
        require_memory(bundle, settings, LIMITS, free=need.least - 1)


def test_a_server_is_refused_before_its_graphs_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*arguments: object, **options: object) -> None:
        raise AssertionError("the graphs were loaded")

    monkeypatch.setattr(bundle_model, "open_graphs", loaded)
    monkeypatch.setattr(memory_need, "free_memory", lambda: 1_000_000)
    with pytest.raises(ConfigError, match="of memory"):
        Server.open(tiny_bundle(), limits=LIMITS)
