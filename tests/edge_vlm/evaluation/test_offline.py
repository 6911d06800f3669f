"""What each question gets to see, under every kind of run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.errors import ConfigError
from edge_vlm.evaluation import offline
from edge_vlm.evaluation.offline import Prefix, View, answer_clip, can_run, choose, kept_cells
from edge_vlm.evaluation.runs import KEEP_RATIOS, SCORED_POLICIES, Run, grid
from edge_vlm.formats.qa_set import AskedQuestion, ClipQuestions
from edge_vlm.pixels.frames import Rgb, encode_jpeg
from edge_vlm.pruning.clip_budget import clip_budget, num_kept, variant_of
from edge_vlm.pruning.policies import Cells, Scores
from edge_vlm.text.prompt import PATCH, PromptFormat
from edge_vlm.text.tokenizer import Tokenizer
from tests.tiny import tiny_checkpoint, tiny_config

FRAMES = 5
MOMENTS = (1, 4, 1, 0)


class Observer:
    """Answers with what it was shown; a feature is its frame's number and its cell's."""

    max_prefix_tokens = 400
    max_block_tokens = 400

    def __init__(self) -> None:
        self.config: ModelConfig = tiny_config()
        self.prompt = PromptFormat(Tokenizer.from_file(tiny_checkpoint() / "tokenizer.json"))
        self.looks = 0

    def look(self, rgbs: Sequence[Rgb]) -> Scores:
        self.looks += 1
        cells = self.config.vision.num_cells
        return np.random.default_rng(3).random((len(rgbs), cells), dtype=np.float32)

    def scored(self, frame: int) -> npt.NDArray[np.float32]:
        raise AssertionError("nothing here is scored by change")

    def features(self, cells: Sequence[Cells]) -> list[npt.NDArray[np.float32]]:
        return [
            np.stack([np.full(len(chosen), i), chosen], 1).astype(np.float32)
            for i, chosen in enumerate(cells)
        ]

    def answer(self, views: Sequence[View], max_tokens: int = 48) -> list[list[str]]:
        return [[self._told(prefix, item.end) for item in asked] for prefix, asked in views]

    def _told(self, prefix: Prefix, end: int) -> str:
        """Frames by number with how many cells of each, and whether later ones are looked at."""
        shown = prefix.ids[:end]
        assert shown[-1] == self.prompt.tokenizer.id_of("<im_end>")
        patches = int((shown == self.prompt.patch_id).sum())
        frames, counts = np.unique(prefix.features[:patches, 0].astype(int), return_counts=True)
        vision = prefix.blocks[prefix.ids == self.prompt.tokenizer.id_of(PATCH)][:patches]
        if len(frames) == 1:
            two_way = "one"
        elif len(set(vision.tolist())) == 1:
            two_way = "all"
            assert end == len(prefix.ids)  # else later frames would be looked at
        else:
            two_way = "frame"
        listed = " ".join(f"{i}:{n}" for i, n in zip(frames, counts, strict=True))
        return f"{two_way} {listed}"


@pytest.fixture(scope="module")
def clip() -> ClipQuestions:
    jpegs = [encode_jpeg(np.full((24, 24, 3), 40 * i, np.uint8)) for i in range(FRAMES)]
    questions = [AskedQuestion(kind="k", text="yes ?", answer="yes", frame=t) for t in MOMENTS]
    times_s = [7.0 + i / 2 for i in range(FRAMES)]
    return ClipQuestions(name="one", jpegs=jpegs, times_s=times_s, questions=questions)


def told(clip: ClipQuestions, *runs: Run) -> dict[Run, list[str]]:
    return {run: list(answers.texts) for run, answers in answer_clip(Observer(), clip, runs)}


ALL, FRAME = VisionAttention.ALL, VisionAttention.FRAME
SEEN = {
    Run("keep_all", 1, FRAME): {0: "one 0:9", 1: "frame 0:9 1:9", 4: "frame 0:9 1:9 2:9 3:9 4:9"},
    Run("keep_all", 1, ALL): {0: "one 0:9", 1: "all 0:9 1:9", 4: "all 0:9 1:9 2:9 3:9 4:9"},
    Run("fewer_frames", 0.5, FRAME): {0: "one 0:9", 1: "one 0:9", 4: "frame 0:9 2:9 4:9"},
    Run("fewer_frames", 0.3, ALL): {0: "one 0:9", 1: "one 0:9", 4: "all 0:9 3:9"},
    Run("last_n", 0.4, FRAME): {0: "one 0:9", 1: "frame 0:9 1:9", 4: "frame 3:9 4:9"},
    Run("last_n", 0.4, ALL): {0: "one 0:9", 1: "all 0:9 1:9", 4: "all 3:9 4:9"},
}


@pytest.mark.parametrize("run", SEEN, ids=lambda run: run.name)
def test_a_question_sees_the_frames_up_to_its_own(clip: ClipQuestions, run: Run) -> None:
    assert told(clip, run)[run] == [SEEN[run][moment] for moment in MOMENTS]


def test_all_runs_share_one_look(clip: ClipQuestions) -> None:
    model = Observer()
    runs = grid()
    answered = dict(answer_clip(model, clip, runs))
    assert list(answered) == runs
    assert model.looks == 1
    for run, answers in answered.items():
        assert answers.cells_seen == FRAMES * 9
        newest = answers.texts[MOMENTS.index(4)].split()[1:]
        if run.policy != "last_n":
            assert sum(int(part.split(":")[1]) for part in newest) == answers.cells_kept


@pytest.mark.parametrize("keep", KEEP_RATIOS[1:])
@pytest.mark.parametrize("rescale", Rescale)
def test_the_row_clip_is_the_rule_that_the_model_is_trained_with(
    keep: float, rescale: Rescale
) -> None:
    scorer = tiny_config().scorer
    assert scorer is not None
    cfg = dataclasses.replace(tiny_config(), scorer=dataclasses.replace(scorer, rescale=rescale))
    scores = np.random.default_rng(0).random((8, 9), dtype=np.float32)
    chosen = choose(Run("clip", keep), scores, [], 0, variant_of(cfg))
    kept = clip_budget(scores, keep, variant=variant_of(cfg))
    for cells, expected in zip(chosen, kept, strict=True):
        assert cells is not None
        np.testing.assert_array_equal(cells, np.flatnonzero(expected))
    num_cells = kept_cells(Run("clip", keep), chosen)
    assert num_cells == num_kept(8, 9, keep, variant=variant_of(cfg))
    if rescale is Rescale.ROW:
        assert num_cells == 72 - int(9 * round(1 - keep, 9) * 8)
    else:
        assert kept[0].all()
        assert num_cells == max(9, round(keep * 72))


def test_random_cells_differ_from_clip_to_clip() -> None:
    scores = np.ones((8, 9), np.float32)
    rgbs = [np.zeros((9, 9, 3), np.uint8)] * 8

    def drawn(seed: int) -> list[list[int]]:
        return [
            [] if c is None else c.tolist()
            for c in choose(Run("random", 0.5), scores, rgbs, seed, "first_whole")
        ]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_clip_that_is_too_long_is_named(clip: ClipQuestions) -> None:
    model = Observer()
    model.max_prefix_tokens = 50
    with pytest.raises(ConfigError, match="the model has room for 50") as caught:
        list(answer_clip(model, clip, [Run("keep_all")]))
    assert "clip one" in str(caught.value.where)


def test_a_model_without_a_scorer_cannot_choose_by_scores(tmp_path: Path) -> None:
    plain = dataclasses.replace(tiny_config(), scorer=None)
    offered = {run.policy for run in grid() if can_run(plain, run)}
    assert offered == {run.policy for run in grid()} - set(SCORED_POLICIES)


def test_frames_that_look_at_each_other_have_to_fit_into_one_run(clip: ClipQuestions) -> None:
    model = Observer()
    model.max_block_tokens = 40
    with pytest.raises(ConfigError, match=r"the model has room for 40 at once.*--max-frames"):
        list(answer_clip(model, clip, [Run("keep_all", 1, ALL)]))
    assert list(answer_clip(model, clip, [Run("keep_all", 1, FRAME)]))  # each by itself


def test_pictures_that_are_not_kept_are_decoded_again(
    clip: ClipQuestions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run("difference", 0.5, FRAME)
    kept = told(clip, run)
    monkeypatch.setattr(offline, "KEPT_BYTES", 24 * 24 * 3 * 2)
    assert told(clip, run) == kept
