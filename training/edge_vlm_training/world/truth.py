"""What rendered clips really show: from it probes learn what each place should tell."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from torch import Tensor

from edge_vlm.world.scenes import Scenes


@dataclasses.dataclass(frozen=True)
class Truth:
    """A batch of equally long clips, B of them with T frames of which S are shown."""

    scenes: Scenes
    owner: Tensor
    """i8 [B, T, H, W]: the thing at each pixel."""
    shown: npt.NDArray[np.int64]
    """[S]: which frames the language model sees; 1 to `forgotten` are not."""
    forgotten: int
