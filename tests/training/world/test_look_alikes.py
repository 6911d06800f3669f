"""What looks like something that is there is asked about, with the true answer."""

from __future__ import annotations

import random

import numpy as np

from edge_vlm.world.sampling import sample_scenes
from edge_vlm.world.scenes import WorldConfig
from edge_vlm.world.sprites import KINDS
from edge_vlm_training.world.curriculum import QuestionMix
from edge_vlm_training.world.look_alikes import ask_look_alike, look_alikes


def test_of_each_kind_others_are_alike() -> None:
    for kind, others in enumerate(look_alikes()):
        assert kind not in others
        assert len(set(others)) == len(others) == 8
    assert KINDS.index("square") in look_alikes()[KINDS.index("circle")]


def test_answers_are_true() -> None:
    scenes = sample_scenes(3, 8, WorldConfig(num_frames=8))
    rng = random.Random(0)
    answers = []
    for b in range(8):
        for t in range(8):
            here = {KINDS[kind] for kind in scenes.kind[b, scenes.visible[b, t]]}
            question = ask_look_alike(scenes, b, t, rng)
            if question is None:
                assert not here
                continue
            kind = question.text.removeprefix("Is there a ").removesuffix(" now?")
            assert question.answer == ("yes" if kind in here else "no")
            alike = {KINDS[other] for name in here for other in look_alikes()[KINDS.index(name)]}
            assert kind in alike | here
            answers.append(question.answer)
    assert 0.15 < np.mean([answer == "yes" for answer in answers]) < 0.55


def test_a_mix_asks_them_only_when_told_to() -> None:
    scenes = sample_scenes(3, 4, WorldConfig(num_frames=8))

    def presence(share: float) -> int:
        mix = QuestionMix(1)
        asked = [mix.branches(scenes, b, 50, 0.0, look_alike_share=share) for b in range(4)]
        return sum(branch.kind == "presence" for clip in asked for branch in clip)

    assert presence(1.0) > 150  # of 200; where nothing is there any question is asked
    assert presence(0.0) < 50
