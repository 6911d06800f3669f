"""Subtitles stand between the video and the first turn, and take room from the video."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edge_vlm.errors import ConfigError
from edge_vlm.text.masks import CAUSAL
from edge_vlm_runtime import protocol
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.generate import generate
from edge_vlm_runtime.inference.sampling import Sampling
from tests.published_folder import image_bundle
from tests.runtime.session.fake_engines import FakeClock
from tests.runtime.session.viewer import Viewer

QUESTION = "what colour is the cube ?"
SUBTITLES = "subtitle\n1.0 - 2.5 the dog <im_patch> is blue"


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(image_bundle(), threads=1) as opened:
        yield opened


def answered(viewer: Viewer, detail: str = "video") -> protocol.ResponseDone:
    viewer.ask(QUESTION, detail=detail)
    viewer.run()
    return viewer.of(protocol.ResponseDone)[-1]


def test_the_answer_is_that_of_the_published_prompt(engines: LoadedBundle) -> None:
    viewer = Viewer(engines, FakeClock(), max_answer_tokens=12, subtitles=SUBTITLES)
    viewer.show(1, 2, 3)
    done = answered(viewer)
    prompt, language = engines.prompt, engines.language
    frames = [known.frame for known in viewer.context._remembered]
    embeds, blocks = [language.embed(prompt.bos_ids)], [np.array([CAUSAL])]
    for i, frame in enumerate(frames):
        ids = prompt.frame_ids(i * 0.5, len(frame.cells), first=i == 0)
        embeds.append(language.embed(ids, frame.embeds))
        blocks.append(np.where(prompt.vision_mask(ids), 0, CAUSAL))
    words = prompt.tokenizer
    text = (
        f"{words.plain(SUBTITLES)}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    arena = language.new_arena(1024)
    language.prefill(arena, np.concatenate(embeds), np.concatenate(blocks))
    logits = language.prefill(arena, language.embed(words.encode(text)))
    tokens = generate(language, arena, logits, Sampling(), prompt.eos_ids, 12)
    assert done.text == words.decode(list(tokens))
    plain = Viewer(engines, FakeClock(), max_answer_tokens=12)
    plain.show(1, 2, 3)
    assert answered(plain).text != done.text
    assert answered(viewer, "snapshot").text == answered(plain, "snapshot").text


def test_they_take_room_from_the_video(engines: LoadedBundle) -> None:
    viewer = Viewer(engines, FakeClock(), max_answer_tokens=300)
    viewer.update(keep_ratio=1.0)
    updated = viewer.of(protocol.SessionUpdated)[-1]
    assert updated.video is not None
    before = updated.video.tokens
    assert before is not None
    viewer.update(subtitles="dog " * 120)
    updated = viewer.of(protocol.SessionUpdated)[-1]
    assert updated.video is not None
    after = updated.video.tokens
    assert after is not None
    assert after < before
    for seq in range(1, 40):
        viewer.show(seq)
    assert after - 20 < viewer.context.shown_tokens <= after
    answered(viewer)
    with pytest.raises(ConfigError, match="the subtitles have 2000"):
        viewer.update(subtitles="dog " * 1000)
    assert viewer.settings.subtitles == "dog " * 120
