"""For those who have published weights: do they say here what they say in transformers?

    EDGE_VLM_WEIGHTS=Molmo2-4B EDGE_VLM_WEIGHTS_CAT=cat.jpeg pytest -m weights

The same checks run on a folder of random weights in every suite, against what a plain forward pass
gives, and against wrong expectations, each of which they have to notice.
"""

from __future__ import annotations

import ast
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from edge_vlm.evaluation.qa_jsonl import read_questions
from edge_vlm.model.images import encode_images
from edge_vlm.model.llm import rope_tables
from edge_vlm.model.published.folder import open_folder
from edge_vlm.pixels.frames import decode_picture, encode_jpeg
from edge_vlm.pixels.stills import prepare_image
from edge_vlm.pixels.video import write_video
from edge_vlm.presets import molmo2_4b, molmo2_8b, molmo2_o_7b
from edge_vlm.text.masks import CAUSAL, block_bias
from tests.model.published.weights_check import (
    CAT_AT,
    CAT_QUESTION,
    CAT_TOKENS,
    EXPECTED,
    PENGUINS_AT,
    PIXELS,
    Checked,
    Expected,
    name_of,
)
from tests.published_folder import published_folder
from tests.runtime.cameras.pictures import scene

WEIGHTS = "EDGE_VLM_WEIGHTS"


def given(variable: str, what: str) -> Path:
    """The path that a variable names; skips with words where it is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"set {variable} to {what}")
    path = Path(os.environ[variable])
    assert path.exists(), f"{variable} = {path}: there is no such file or folder"
    return path


@pytest.fixture(scope="module")
def own() -> Checked:
    folder = given(WEIGHTS, "a folder of Molmo2-4B, 8B or O-7B as it was downloaded")
    return Checked(open_folder(folder))


@pytest.mark.weights
def test_prompts_begin_as_the_model_was_trained(own: Checked) -> None:
    own.first_token(EXPECTED[name_of(own.folder)])


@pytest.mark.weights
def test_the_cat_is_described(own: Checked) -> None:
    cat = given(f"{WEIGHTS}_CAT", f"the picture of {CAT_AT}")
    own.picture(cat, EXPECTED[name_of(own.folder)], PIXELS)


@pytest.mark.weights
def test_the_penguins_are_seen(own: Checked, tmp_path: Path) -> None:
    wanted = EXPECTED[name_of(own.folder)].video_text
    if wanted is None:
        pytest.skip("transformers has an answer about the video for Molmo2-8B only")
    own.video(given(f"{WEIGHTS}_PENGUINS", f"the video of {PENGUINS_AT}"), wanted, tmp_path)


# ---- the same checks on random weights ----------------------------------------------------------


@pytest.fixture(scope="module")
def random() -> Checked:
    return Checked(open_folder(published_folder()))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "cat.jpeg"
    rgb = np.random.default_rng(4).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    path.write_bytes(encode_jpeg(rgb))
    return path


@pytest.fixture(scope="module")
def plain(random: Checked, picture: Path) -> tuple[Expected, list[list[float]]]:
    """What the model says, by one pass over the whole sequence for each token."""
    model, prompt = random.model.model, random.prompt
    images = random.folder.usage.images
    assert images is not None
    crops = prepare_image(decode_picture(picture.read_bytes()), model.cfg.vision, images)
    ids = [*prompt.bos_ids, *prompt.image_ids([crops.grid]), *prompt.question_ids(CAT_QUESTION)]
    said: list[int] = []
    first: torch.Tensor | None = None
    with torch.inference_mode():
        pixels, windows = torch.from_numpy(crops.pixels), torch.from_numpy(crops.windows)
        features = encode_images(model, pixels, windows)
        while len(said) < CAT_TOKENS:
            every = torch.tensor([*map(int, ids), *said])
            embeds = model.llm.embed(every[None])
            embeds[0, every == prompt.patch_id] += features
            blocks = np.where(prompt.vision_mask(every.numpy()), 0, CAUSAL)
            bias = torch.from_numpy(block_bias(blocks))[None]
            tables = rope_tables(model.llm.cfg, torch.arange(len(every))[None])
            logits = model.llm.head(model.llm(embeds, *tables, bias)[0])[0, -1]
            first = logits if first is None else first
            said.append(int(logits.argmax()))
    assert first is not None
    expected = Expected(
        first_token=int(ids[0]),
        crops=len(crops.pixels),
        pooled=len(crops.windows),
        argmax=said[0],
        text=prompt.tokenizer.decode(said).strip(),
        logits=tuple(first[:6].tolist()),
        tolerance=1e-3,
    )
    return expected, crops.pixels[0, :3, :3].tolist()


def test_random_weights_pass(
    random: Checked, picture: Path, plain: tuple[Expected, list[list[float]]]
) -> None:
    expected, pixels = plain
    random.first_token(expected)
    random.picture(picture, expected, pixels)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"crops": 7}, "crops and tokens"),
        ({"pooled": 955}, "crops and tokens"),
        ({"argmax": 3}, "likeliest token"),
        ({"text": "In this captivating image"}, "the answer is"),
        ({"logits": (0.0,) * 6}, "apart"),
    ],
)
def test_what_is_otherwise_is_noticed(
    random: Checked,
    picture: Path,
    plain: tuple[Expected, list[list[float]]],
    wrong: dict[str, object],
    words: str,
) -> None:
    expected, pixels = plain
    with pytest.raises(AssertionError, match=words):
        random.picture(picture, dataclasses.replace(expected, **wrong), pixels)  # type: ignore[arg-type]


def test_another_begin_and_other_pixels_are_noticed(
    random: Checked, picture: Path, plain: tuple[Expected, list[list[float]]]
) -> None:
    expected, pixels = plain
    with pytest.raises(AssertionError, match="a prompt begins with"):
        random.first_token(EXPECTED["Molmo2-O-7B"])
    with pytest.raises(AssertionError, match="other pixels"):
        random.picture(picture, expected, [[value + 0.1 for value in row] for row in pixels])


def test_a_video_is_answered_by_the_folders_rule(random: Checked, tmp_path: Path) -> None:
    video = tmp_path / "penguins.mp4"
    write_video(video, np.stack(scene("fast", 9)), 4)
    with pytest.raises(AssertionError, match="the answer is") as caught:
        random.video(video, "Penguins appear in the video.", tmp_path)
    said = ast.literal_eval(str(caught.value).splitlines()[0].removeprefix("the answer is "))
    random.video(video, said.strip(), tmp_path)
    (clip,) = read_questions(tmp_path / "one.jsonl", rule=random.folder.usage.frames)
    assert clip.times_s == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_models_are_told_apart_by_their_shapes(random: Checked) -> None:
    shapes = {"Molmo2-4B": molmo2_4b(), "Molmo2-8B": molmo2_8b(), "Molmo2-O-7B": molmo2_o_7b()}
    for name, cfg in shapes.items():
        assert name_of(dataclasses.replace(random.folder, config=cfg)) == name
    with pytest.raises(KeyError, match="no published model"):
        name_of(random.folder)
