"""What transformers' own tests expect of the published weights, and how a folder is held to it.

Expectations: `tests/models/molmo2/test_modeling_molmo2.py` of huggingface/transformers, which were
recorded there with the real weights and not made by this project.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edge_vlm.config import VisionAttention
from edge_vlm.evaluation.offline import Asked, Prefix, answer_clip
from edge_vlm.evaluation.qa_jsonl import read_questions
from edge_vlm.evaluation.runs import Run
from edge_vlm.model.evaluator import TorchModel, _Decoding
from edge_vlm.model.images import encode_images
from edge_vlm.model.published.folder import ModelFolder
from edge_vlm.pixels.frames import decode_picture
from edge_vlm.pixels.stills import prepare_image
from edge_vlm.text.masks import CAUSAL
from edge_vlm.text.prompt import PromptFormat
from edge_vlm.text.tokenizer import Tokenizer

CAT_AT = (
    "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/"
    "pipeline-cat-chonk.jpeg"
)
PENGUINS_AT = "https://storage.googleapis.com/oe-training-public/demo_videos/many_penguins.mp4"
CAT_QUESTION, PENGUINS_QUESTION = "Describe this image.", "Which animal appears in the video?"
CAT_TOKENS = 10
PIXELS = [
    [-0.0745098, -0.05098039, 0.0196079],
    [-0.7019608, -0.6784314, -0.60784316],
    [-0.8745098, -0.88235295, -0.84313726],
]
"""Of the cat: first values of the first patches of the whole view."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Of one published model. `text` is the begin of the cat's description."""

    first_token: int
    crops: int = 7
    pooled: int = 955
    argmax: int
    text: str
    logits: tuple[float, ...]
    """Of the first ids behind the cat's question."""
    tolerance: float
    video_text: str | None = None


EXPECTED = {
    "Molmo2-4B": Expected(
        first_token=151_645,
        argmax=641,
        text="In this captivating image, a large, chubby cat",
        logits=(-10.443631, -6.061066, -11.089376, -10.382135, -16.847486, -14.479667),
        tolerance=0.2,  # recorded on two devices they differ by as much
    ),
    "Molmo2-8B": Expected(
        first_token=151_645,
        argmax=641,
        text="In this captivating image, a",  # then bf16 and fp32 may part
        logits=(-15.8125, -7.875, -15.5625, -14.9375, -16.5, -18.25),
        tolerance=0.9,  # recorded in bf16
        video_text="Penguins appear in the video.",
    ),
    "Molmo2-O-7B": Expected(
        first_token=100_257,
        argmax=644,
        text="In this captivating image, a",
        logits=(-13.0625, -5.875, -11.6875, -11.0, -12.6875, -16.25),
        tolerance=0.9,
    ),
}


def name_of(folder: ModelFolder) -> str:
    """Which of the published models has these shapes. Raises KeyError for none of them."""
    language = folder.config.language
    shape = (language.width, language.num_layers, language.post_norm)
    names = {
        (2560, 36, False): "Molmo2-4B",
        (4096, 36, False): "Molmo2-8B",
        (4096, 32, True): "Molmo2-O-7B",
    }
    if shape not in names:
        raise KeyError(f"no published model has {shape}: transformers expects nothing of it")
    return names[shape]


class Checked:
    """A folder's model, ready to be asked in torch as `edge-vlm eval` asks it."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        words = Tokenizer.from_file(folder.require_tokenizer())
        self.prompt = PromptFormat(words, folder.usage.style)
        self.model = TorchModel(folder.load(), self.prompt)

    def first_token(self, expected: Expected) -> None:
        found = self.prompt.bos_ids.tolist()
        assert found == [expected.first_token], f"a prompt begins with {found}"

    @torch.inference_mode()
    def picture(self, path: Path, expected: Expected, pixels: list[list[float]]) -> None:
        """Preprocessing, the logits behind the question and the begin of the answer."""
        images = self.folder.usage.images
        assert images is not None, "the folder knows no still pictures"
        crops = prepare_image(decode_picture(path.read_bytes()), self.model.config.vision, images)
        found = (len(crops.pixels), len(crops.windows))
        assert found == (expected.crops, expected.pooled), f"{path}: {found} crops and tokens"
        corner = crops.pixels[0, : len(pixels), : len(pixels[0])]
        np.testing.assert_allclose(corner, pixels, atol=1e-2, err_msg=f"{path}: other pixels")
        features = encode_images(
            self.model.model, torch.from_numpy(crops.pixels), torch.from_numpy(crops.windows)
        )
        ids = np.concatenate([self.prompt.bos_ids, self.prompt.image_ids([crops.grid])])
        prefix = Prefix(ids, features.numpy(), np.where(self.prompt.vision_mask(ids), 0, CAUSAL))
        asked = Asked(len(ids), self.prompt.question_ids(CAT_QUESTION))
        past = self.model._prefill([prefix])
        llm, ends = self.model.model.llm, self.prompt.eos_ids
        decoding = _Decoding(llm, past, [(0, asked)], ends, CAT_TOKENS)
        logits = decoding.logits_R[0].float()
        wanted = torch.tensor(expected.logits)
        apart = float((logits[: len(wanted)] - wanted).abs().max())
        assert apart <= expected.tolerance, f"the first logits are {apart:.3f} apart"
        best = int(logits.argmax())
        assert best == expected.argmax, f"the likeliest token is {best}"
        (tokens,) = decoding.run()
        text = self.prompt.tokenizer.decode(tokens).strip()
        assert text.startswith(expected.text), f"the answer is {text!r}"

    def video(self, path: Path, wanted: str, folder: Path) -> None:
        """By the folder's frame rule, through the path `torch` of `edge-vlm eval`."""
        line = {"video": str(path.absolute()), "question": PENGUINS_QUESTION, "answer": wanted}
        (folder / "one.jsonl").write_text(json.dumps(line))
        (clip,) = read_questions(folder / "one.jsonl", rule=self.folder.usage.frames)
        run = Run("keep_all", 1.0, VisionAttention.ALL)
        ((_, answers),) = answer_clip(self.model, clip, [run])
        assert answers.texts[0].strip() == wanted, f"the answer is {answers.texts[0]!r}"
