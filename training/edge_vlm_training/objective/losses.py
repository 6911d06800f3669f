"""The two losses of STTS training (arXiv 2603.18004).

Shape letters: F frames (several clips end to end), C cells, D ViT width, A answer tokens, V
vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbour_similarity(patches_FC9D: Tensor) -> Tensor:
    """Cosine of each cell's nine raw patches with the frame before, fp32 [F, C]; 0 for frame 0.

    Only neighbouring frames are compared, so memory grows with F and not with its square.
    """
    flat = F.normalize(patches_FC9D.flatten(2).float(), dim=-1)
    return F.pad((flat[1:] * flat[:-1]).sum(-1), (0, 0, 1, 0))


def similarity_errors(
    scores_FC: Tensor, patches_FC9D: Tensor, is_first_F: Tensor, *, detach_target: bool = True
) -> Tensor:
    """Squared distances of score and 1 - similarity, fp32 [later frames, C]: frames that have a
    predecessor. The loss is their mean; sum and number add up over unequal batches and processes.

    The reference lets the target's gradient reach the ViT, which can then lower the loss by
    flattening its own features; `detach_target=False` reproduces that.
    """
    if detach_target:
        patches_FC9D = patches_FC9D.detach()
    target = 1 - neighbour_similarity(patches_FC9D)
    later = ~is_first_F
    return (scores_FC[later].float() - target[later]).square()


def feature_scale_loss(features_GE: Tensor, limit: float = 4.0) -> Tensor:
    """Squared log of how far the features' root mean square exceeds `limit`; 0 below it.

    The first block normalises what it reads, so nothing else holds the scale of the features: left
    alone it grows until the residual stream drowns whatever the blocks add to a vision token (seen
    at a root mean square of 286, where bf16 rounds such additions away).
    """
    rms = features_GE.float().square().mean().sqrt()
    return (rms / limit).log().clamp(min=0).square()


def answer_sums(
    logits_AV: Tensor, targets_A: Tensor, weights_A: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of cross-entropy and of the squared log-partition (z-loss), and right tokens.

    All in fp32; divide the first two by the sum of weights over the whole update, which may be
    spread over batches and processes. The third is the number of tokens that are the arg-max.
    """
    logits = logits_AV.float()
    partition = logits.logsumexp(-1)
    chosen = logits.gather(1, targets_A[:, None]).squeeze(1)
    losses, squares = partition - chosen, partition.square()
    right = (logits.detach().argmax(-1) == targets_A).sum()
    return (losses * weights_A).sum(), (squares * weights_A).sum(), right


def exact_answers(logits_AV: Tensor, targets_A: Tensor, question_A: Tensor, num: int) -> Tensor:
    """Bool [num]: every token of that question's answer is the arg-max.

    Under teacher forcing this equals the exact match of greedy generation.
    """
    wrong = (logits_AV.argmax(-1) != targets_A).to(torch.int32)
    return (
        torch.zeros(num, dtype=torch.int32, device=wrong.device).index_add(0, question_A, wrong)
        == 0
    )
