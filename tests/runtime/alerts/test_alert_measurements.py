"""Alerts on the real tiny model: measured together as each alone, and no answer changes."""

from __future__ import annotations

import numpy as np
import pytest

from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.protocol import alerts as messages
from edge_vlm_runtime.protocol.settings import Attention
from tests.runtime.alerts.test_alerts import Watcher
from tests.runtime.session.fake_engines import FakeClock
from tests.tiny import tiny_bundle

QUESTION = "is there a red ball ?"


def test_measuring_equals_asking_each_question_alone() -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        language, prompt = engines.language, engines.prompt
        arena = language.new_arena(200)
        frame = prompt.frame_ids(0.0, 0, first=True)
        language.prefill(arena, language.embed(np.concatenate([prompt.bos_ids, frame])))
        texts = [
            "is there a red ball ?",
            "what colour is the cube ?",
            "no .",
            "which way does the dog move ?",
        ]
        branches = [language.embed(prompt.question_ids(text)) for text in texts]
        alone = []
        mark = arena.mark()
        for branch in branches:
            alone.append(language.prefill(arena, branch))
            arena.truncate(mark)
        before = [array.copy() for array in arena.rows(0)]
        together = language.measure(arena, branches)
        np.testing.assert_allclose(together, np.stack(alone), atol=2e-5)
        assert arena.length == mark
        for array, copy in zip(arena.rows(0), before, strict=True):
            np.testing.assert_array_equal(array, copy)
        # more than one run when they do not fit into one
        many = language.measure(arena, branches * 6)
        assert sum(len(branch) for branch in branches * 6) > language.max_tokens
        np.testing.assert_allclose(many, np.tile(np.stack(alone), (6, 1)), atol=2e-5)
        with pytest.raises(ValueError, match="branches"):
            language.measure(arena, [])


@pytest.mark.parametrize("attention", [Attention.FRAME, Attention.EXACT])
def test_alerts_change_no_answer(attention: Attention) -> None:
    with LoadedBundle.open(tiny_bundle(), threads=1) as engines:
        said = []
        for watched in (False, True):
            watcher = Watcher(engines, FakeClock(), max_answer_tokens=8, attention=attention)
            if watched:
                watcher.create(report_checks=True)
                watcher.create("what colour is the cube ?")
            for sequence in range(1, 7):
                watcher.show(sequence)
                if sequence % 2 == 0:
                    watcher.ask()
                    watcher.run()
            said.append(
                [
                    (event.text, event.kv_tokens, event.usage.vision_tokens)
                    for event in watcher.of(protocol.ResponseDone)
                ]
            )
        assert len(watcher.of(messages.AlertChecked)) == 6
    assert said[0] == said[1]
