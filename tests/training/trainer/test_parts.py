"""The pieces of the loop one by one: updates, samples, first weights, speed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from edge_vlm.config import ModelConfig, Rescale, VisionAttention
from edge_vlm.errors import CheckpointError, ConfigError
from edge_vlm.flops import language_flops, vision_flops
from edge_vlm.model.published.hub import save_published
from edge_vlm.model.video_lm import VideoLM
from edge_vlm.presets import tiny
from edge_vlm.text.tokenizer import Tokenizer
from edge_vlm_training.data.packing.batch import IGNORED, NOWHERE
from edge_vlm_training.objective.objective import Objective, totals_of
from edge_vlm_training.objective.terms import Totals
from edge_vlm_training.recipes.base import PARTS, Answers, Similarity
from edge_vlm_training.recipes.demo import demo_larger
from edge_vlm_training.recipes.molmo2 import molmo2_4b_stts_50, stts_smoke
from edge_vlm_training.recipes.overrides import override
from edge_vlm_training.trainer.distributed import join_ranks
from edge_vlm_training.trainer.model_factory import (
    build_model,
    model_config,
    prepare_tokenizer,
    trained_usage,
)
from edge_vlm_training.trainer.optimizer import Masters, Updater, named_weights, parts_of
from edge_vlm_training.trainer.samples import sample_answers
from edge_vlm_training.trainer.speed import peak_tflops, training_flops
from tests.training.trainer.batches import make_batch


def small_model(seed: int = 0, cfg: ModelConfig | None = None) -> VideoLM:
    return VideoLM(cfg or tiny()).init_weights(torch.Generator().manual_seed(seed))


def test_parts_share_out_every_weight() -> None:
    weights = dict(small_model().named_parameters())
    parts = parts_of(stts_smoke().stages[0], weights)
    assert set(parts) == set(PARTS)
    assert sorted(n for part in parts.values() for n in part.names) == sorted(weights)


def test_an_update_is_adamw_with_each_part_clipped_on_its_own() -> None:
    rates = ["lr_llm=1e-2", "lr_vit=2e-2", "lr_connector=3e-2", "lr_scorer=4e-2"]
    recipe = override(stts_smoke(), ["warmup_steps=0", *rates])
    (stage,) = recipe.stages
    ours, plain = small_model(), small_model()
    updater = Updater(Masters(named_weights(Objective(ours, stage.terms))), stage, recipe)
    weights = dict(plain.named_parameters())
    parts = {
        key: (part.rate, [weights[name] for name in part.names])
        for key, part in parts_of(stage, weights).items()
    }
    groups = [{"params": tensors, "lr": rate} for rate, tensors in parts.values()]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        expected = {
            key: float(torch.nn.utils.clip_grad_norm_(tensors, 1.0))
            for key, (_, tensors) in parts.items()
        }
        factor = stage.rate_at(step, step / 6)
        for group, (rate, _) in zip(adamw.param_groups, parts.values(), strict=True):
            group["lr"] = rate * factor
        adamw.step()
        assert updater.apply(factor) == pytest.approx(expected, rel=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_samples_are_what_the_model_would_say(tmp_path: Path) -> None:
    """Word by word in a row of its own: the same as the arg-max in the packed row, while right."""
    recipe = stts_smoke()
    tokenizer = Tokenizer.from_file(prepare_tokenizer(recipe, tmp_path))
    model = small_model(2, tiny(base_vocab=90))
    objective = Objective(model, (Answers(),), residual_dropout=0.5)
    batch = make_batch(model.cfg.vision, ((2, 3),), 4)
    lines = sample_answers(objective, batch, tokenizer, 1, 2)
    assert objective.training  # as it was
    objective.eval()
    with torch.no_grad():
        seen = objective.see(batch)
        tokens = batch.pruned(seen.kept_FC)
        hidden = objective.hidden_states(tokens, seen.features_GE)
        for branch, line in enumerate(lines):
            mine = (tokens.branch_RS[0] == branch) & (tokens.target_RS[0] != IGNORED)
            first = int(mine.nonzero()[0, 0])
            said = int(objective.logits(hidden[0, first : first + 1]).argmax())
            answer = line.split(" | ")[1]
            assert answer.startswith(tokenizer.decode([said]).strip())
            wanted = tokenizer.decode(tokens.target_RS[0][mine].tolist())
            assert line.endswith(f"wanted {' '.join(wanted.split())}")
    assert (tokens.branch_RS != NOWHERE).any()


def test_a_published_folder_without_a_scorer_gets_one(tmp_path: Path) -> None:
    deeper = dataclasses.replace(tiny().vision, num_layers=8, feature_layers=(7, 4))
    bare = dataclasses.replace(tiny(), vision=deeper, scorer=None, attention=VisionAttention.ALL)
    published = small_model(3, bare)
    folder = tmp_path / "published"
    save_published(folder, published)
    recipe = override(stts_smoke(), [f"init={folder}", "rescale=row"])
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json.*--set tokenizer"):
        prepare_tokenizer(recipe, tmp_path / "run")
    cfg = model_config(recipe, tmp_path / "unused.json")
    assert cfg.scorer is not None
    assert cfg.scorer.rescale is Rescale.ROW
    assert cfg.attention is recipe.attention
    model, again = (build_model(recipe, cfg, folder) for _ in range(2))
    for name, tensor in published.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.scorer is not None
    assert again.scorer is not None
    assert torch.equal(model.scorer.fc1.weight, again.scorer.fc1.weight)  # in every process
    std = float(model.scorer.fc2.weight.detach().std())
    assert std == pytest.approx(cfg.scorer.mlp_width**-0.5, rel=0.1)
    assert not model.scorer.fc2.bias.any()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_published_recipe_needs_a_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no vocabulary of its own.*--init"):
        prepare_tokenizer(molmo2_4b_stts_50(), tmp_path)


def test_the_step_s_operations_are_three_forward_passes() -> None:
    cfg = tiny()
    forward = vision_flops(cfg, [9, 4]) + language_flops(cfg.language, 40)
    forward += language_flops(cfg.language, 7) + 2 * 5 * 48 * 96
    assert training_flops(cfg, [9, 4], [40, 7], 5) == 3 * forward
    assert 0 < peak_tflops(torch.device("cpu"), torch.float32) < 1e3


def test_a_recipe_for_a_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="wants a GPU"), join_ranks("cuda"):
        pass
    with join_ranks() as ranks:
        assert (ranks.rank, ranks.size, ranks.device.type) == (0, 1, "cpu")
        assert ranks.leads
        assert ranks.sum(torch.tensor(2.0)).item() == 2.0


def test_bfloat16_products_come_near_float32(tmp_path: Path) -> None:
    model = small_model(5)
    batch = make_batch(model.cfg.vision, ((3,),), 6)
    totals = Totals(*totals_of([batch], model.cfg.vision.num_cells))
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        objective = Objective(
            model, (Answers(z_loss=1e-4), Similarity(0.5)), dtype=dtype, autocast=True
        )
        found = objective(batch, totals)
        assert found.loss.dtype is torch.float32
        losses[dtype] = found.loss.item()
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)
    assert losses[torch.bfloat16] != losses[torch.float32]


def test_rates_and_rules_are_those_of_the_recipe() -> None:
    (stage,) = override(stts_smoke(), ["steps=10", "warmup_steps=0"]).stages
    assert stage.rate_at(0, 0.0) == 1.0
    assert math.isclose(stage.rate_at(10, 1.0), 0.1)


def test_a_model_of_rendered_clips_says_how_late_it_can_tell_the_time() -> None:
    """The longest clip of its stages: sixteen pictures, two a second."""
    usage = trained_usage(demo_larger())
    assert usage.defaults == {"max_time_s": 8.0}
