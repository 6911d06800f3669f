"""transformers' own Molmo2 processors, run without torchvision, and what they were seen to make.

They take two things from torchvision: `resize`, which for tensors is torch's `interpolate`, and
`normalize`, which subtracts and divides. Those two lines stand in here; all else is their code.

    python -m tests.published_processors [TOKENIZER_FOLDER]

writes `tests/data/preprocessing.json` anew: digests of pixels and pooling windows, and, for the
published folder with tokenizer.json and chat_template.jinja, token ids of whole prompts.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor
from transformers.video_utils import VideoMetadata

from tests.preprocessing_record import (
    ANSWER,
    FRAMES,
    FRAMES_OF_EACH,
    IMAGE_PROMPTS,
    IMAGES,
    PATH,
    PUBLISHED_4B,
    QUESTION,
    STAMPS_S,
    digest,
    picture,
)

BILINEAR = 2
STAMPS_FPS = 4.0


class _WithoutTorchvision:
    def resize(
        self, image: torch.Tensor, size: Any, resample: Any = None, antialias: bool = True
    ) -> torch.Tensor:
        assert int(resample) == BILINEAR
        assert not antialias
        shape = (size.height, size.width)
        return torch.nn.functional.interpolate(image, shape, mode="bilinear", align_corners=False)

    def normalize(
        self, image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, inplace: bool = False
    ) -> torch.Tensor:
        return (image - mean[:, None, None]) / std[:, None, None]

    def convert_to_rgb(self, image: torch.Tensor, **_: object) -> torch.Tensor:
        assert image.shape[-3] == 3
        return image


class _Images(_WithoutTorchvision, Molmo2ImageProcessor):
    pass


class _Videos(_WithoutTorchvision, Molmo2VideoProcessor):
    # Unset in the class, where the published folders' files and their own code have them on.
    do_rescale = True
    do_normalize = True


class _Processor(Molmo2Processor):
    def check_argument_for_proper_class(self, *_: object) -> None:
        """The check looks up classes that exist with torchvision only."""


def published_images(
    pictures: Sequence[NDArray[np.uint8]], max_crops: int = 8, **settings: Any
) -> dict[str, NDArray[Any]]:
    """`pixel_values`, `image_token_pooling`, `image_grids` and `image_num_crops`."""
    made = _Images()(
        list(pictures), max_crops=max_crops, input_data_format="channels_last", **settings
    )
    return {name: np.asarray(value) for name, value in made.items()}


def published_video(frames: Sequence[NDArray[np.uint8]]) -> dict[str, NDArray[Any]]:
    """`pixel_values_videos`, `video_token_pooling` and `video_grids` of frames of one size."""
    made = _Videos()(
        videos=[np.stack(frames)], do_sample_frames=False, input_data_format="channels_last"
    )
    return {name: np.asarray(value) for name, value in made.items()}


def published_processor(folder: Path, **flags: bool) -> Molmo2Processor:
    """With the tokenizer and chat template of a folder."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token="<|im_end|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    template = (folder / "chat_template.jinja").read_text()
    return _Processor(_Images(), _Videos(), tokenizer, chat_template=template, **flags)


def _text(processor: Molmo2Processor, kind: str, count: int) -> str:
    content = [{"type": kind}] * count + [{"type": "text", "text": QUESTION}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": QUESTION},
    ]
    rendered = processor.tokenizer.apply_chat_template(
        messages,
        chat_template=processor.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert isinstance(rendered, str)
    return rendered


def image_prompt(processor: Molmo2Processor, sizes: Sequence[tuple[int, int]]) -> Any:
    """`input_ids` and `mm_token_type_ids` of a dialogue about images of these sizes."""
    pictures = [picture(height, width) for height, width in sizes]
    return processor(images=pictures, text=_text(processor, "image", len(pictures)))


def video_prompt(processor: Molmo2Processor) -> Any:
    """The same dialogue about frames at `STAMPS_S`."""
    frames = np.stack([picture(36, 36, seed) for seed in range(len(STAMPS_S))])
    indices = [round(stamp * STAMPS_FPS) for stamp in STAMPS_S]
    metadata = VideoMetadata(total_num_frames=100, fps=STAMPS_FPS, frames_indices=indices)
    return processor(
        videos=[frames],
        text=_text(processor, "video", 1),
        do_sample_frames=False,
        video_metadata=[metadata],
    )


def runs(values: Sequence[int]) -> list[list[int]]:
    """[value, how often in a row] pairs."""
    return [[value, len(list(group))] for value, group in itertools.groupby(values)]


def _prompt_record(made: Any) -> dict[str, Any]:
    return {
        "ids": runs(np.asarray(made["input_ids"])[0].tolist()),
        "vision": runs(np.asarray(made["mm_token_type_ids"])[0].tolist()),
    }


def record(folder: Path) -> dict[str, Any]:
    images = []
    for height, width, max_crops in IMAGES:
        made = published_images([picture(height, width)], max_crops)
        images.append(
            {
                "size": [height, width],
                "max_crops": max_crops,
                "grid": made["image_grids"][0].tolist(),
                "crops": int(made["image_num_crops"][0]),
                "windows": digest(made["image_token_pooling"].astype(np.int32)),
                "pixels": digest(made["pixel_values"]),
                "some_pixels": made["pixel_values"][-1, 100, :6].tolist(),
            }
        )
    frames = []
    for height, width in FRAMES:
        made = published_video([picture(height, width, seed) for seed in range(FRAMES_OF_EACH)])
        frames.append(
            {
                "size": [height, width],
                "pixels": digest(made["pixel_values_videos"]),
                "windows": digest(made["video_token_pooling"].astype(np.int32)),
            }
        )
    plain = published_processor(
        folder, use_single_crop_col_tokens=False, use_frame_special_tokens=False
    )
    web = published_processor(
        folder,
        use_single_crop_col_tokens=False,
        use_frame_special_tokens=False,
        use_single_crop_start_token=False,
    )
    other = published_processor(folder)
    return {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "images": images,
        "frames": frames,
        "prompts": {
            "released": {
                "images": [_prompt_record(image_prompt(plain, sizes)) for sizes in IMAGE_PROMPTS],
                "video": _prompt_record(video_prompt(plain)),
            },
            "web": {
                "images": [_prompt_record(image_prompt(web, sizes)) for sizes in IMAGE_PROMPTS],
                "video": _prompt_record(video_prompt(web)),
            },
            "class defaults": {
                "images": [_prompt_record(image_prompt(other, sizes)) for sizes in IMAGE_PROMPTS],
                "video": _prompt_record(video_prompt(other)),
            },
        },
    }


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PUBLISHED_4B
    PATH.write_text(json.dumps(record(folder)) + "\n")
    print(f"{PATH}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
