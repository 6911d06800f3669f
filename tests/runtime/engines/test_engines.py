"""The engine side on a tiny random bundle: what is cached equals what is computed whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_vlm.errors import (
    BundleSchemaError,
    EngineError,
    KvFull,
    NonFinite,
    PositionsUsedUp,
    ShapeRange,
)
from edge_vlm.formats.bundle import EMBED_TABLE, MANIFEST, sha256_of_file
from edge_vlm.pixels.frames import Frame
from edge_vlm.pruning.policies import KeepAll, RandomCells
from edge_vlm_runtime.inference.bundle_model import LoadedBundle
from edge_vlm_runtime.inference.generate import generate
from edge_vlm_runtime.inference.kv_arena import KVArena
from edge_vlm_runtime.inference.sampling import Sampling
from edge_vlm_runtime.inference.vision import FrameTokens
from tests.tiny import TINY_LIMITS, tiny_bundle


def _assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedBundle]:
    with LoadedBundle.open(tiny_bundle(), threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(engines: LoadedBundle) -> list[FrameTokens]:
    """Six random pictures, about half of the cells kept."""
    rng = np.random.default_rng(3)
    state = engines.vision.new_state()
    policy = RandomCells(0.5, seed=1)
    frames = [
        Frame(rgb=rng.integers(0, 256, (40, 52, 3), dtype=np.uint8), pts_ns=i * 5 * 10**8, seq=i)
        for i in range(6)
    ]
    return [engines.vision.encode(frame, state, policy) for frame in frames]


def _segment(
    engines: LoadedBundle, tokens: FrameTokens, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and block ids of one frame, as a session lays them out."""
    ids = engines.prompt.frame_ids(tokens.pts_ns / 1e9, len(tokens.cells), first=index == 0)
    blocks = np.where(engines.prompt.vision_mask(ids), index, -1)
    return engines.language.embed(ids, tokens.embeds), blocks


def _prompt(engines: LoadedBundle, clip: list[FrameTokens]) -> tuple[np.ndarray, np.ndarray]:
    lm, prompt = engines.language, engines.prompt
    bos, question = lm.embed(prompt.bos_ids), lm.embed(prompt.question_ids("is there a red ball ?"))
    parts = [(bos, np.full(len(bos), -1))]
    parts += [_segment(engines, tokens, i) for i, tokens in enumerate(clip)]
    parts.append((question, np.full(len(question), -1)))
    return np.concatenate([e for e, _ in parts]), np.concatenate([b for _, b in parts])


def _same_rows(a: KVArena, b: KVArena, layers: int = 2) -> None:
    assert a.positions.tolist() == b.positions.tolist()
    for layer in range(layers):
        for left, right in zip(a.rows(layer), b.rows(layer), strict=True):
            _assert_close(left, right)


def test_frame_by_frame_equals_the_whole_clip(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    embeds, blocks = _prompt(engines, clip[:4])
    whole = lm.new_arena(200)
    expected = lm.prefill(whole, embeds, blocks)

    stepwise = lm.new_arena(200)
    lm.prefill(stepwise, lm.embed(engines.prompt.bos_ids))
    for i, tokens in enumerate(clip[:4]):
        lm.prefill(stepwise, *_segment(engines, tokens, i))
    question = engines.prompt.question_ids("is there a red ball ?")
    logits = lm.prefill(stepwise, lm.embed(question))
    _assert_close(logits, expected)
    _same_rows(stepwise, whole)


def test_the_block_mask_matters(engines: LoadedBundle, clip: list[FrameTokens]) -> None:
    lm = engines.language
    embeds, blocks = _prompt(engines, clip[:2])
    arenas = [lm.new_arena(100) for _ in range(3)]
    per_frame = lm.prefill(arenas[0], embeds, blocks)
    causal = lm.prefill(arenas[1], embeds)
    published = lm.prefill(arenas[2], embeds, np.where(blocks >= 0, 0, -1))
    assert np.abs(per_frame - causal).max() > 1e-4
    assert np.abs(per_frame - published).max() > 1e-4


def test_decoding_equals_one_full_prefill(engines: LoadedBundle, clip: list[FrameTokens]) -> None:
    lm = engines.language
    embeds, blocks = _prompt(engines, clip[:3])
    arena = lm.new_arena(200)
    logits = lm.prefill(arena, embeds, blocks)
    tokens = [7, 3, 3, 11, 20]
    for n, token in enumerate(tokens, 1):
        logits = lm.decode_step(arena, token)
        fresh = lm.new_arena(200)
        expected = lm.prefill(
            fresh,
            np.concatenate([embeds, lm.embed(tokens[:n])]),
            np.concatenate([blocks, np.full(n, -1)]),
        )
        _assert_close(logits, expected)
    _same_rows(arena, fresh)


def test_a_long_prefill_is_cut_between_frames_with_the_same_result(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    embeds, blocks = _prompt(engines, clip)
    repeats = 1 + TINY_LIMITS["max_tokens"] // len(embeds)
    tiled = np.concatenate([embeds] * repeats)
    ids = np.concatenate([np.where(blocks >= 0, blocks + 10 * i, -1) for i in range(repeats)])
    assert len(tiled) > lm.max_tokens
    cut, stepwise = lm.new_arena(), lm.new_arena()
    logits = lm.prefill(cut, tiled, ids)
    for i in range(repeats):
        part = slice(i * len(embeds), (i + 1) * len(embeds))
        expected = lm.prefill(stepwise, tiled[part], ids[part])
    _assert_close(logits, expected)
    _same_rows(cut, stepwise)


def test_a_block_larger_than_a_run_is_refused(engines: LoadedBundle) -> None:
    lm = engines.language
    arena = lm.new_arena()
    s = lm.max_tokens + 1
    with pytest.raises(ShapeRange, match="a block of vision tokens has more"):
        lm.prefill(arena, np.zeros((s, lm.cfg.width), np.float32), np.zeros(s, np.int32))
    assert arena.length == 0


def test_truncate_equals_never_appended(engines: LoadedBundle, clip: list[FrameTokens]) -> None:
    lm = engines.language
    clean, branched = lm.new_arena(200), lm.new_arena(200)
    for arena in (clean, branched):
        lm.prefill(arena, *_segment(engines, clip[0], 0))
    mark = branched.mark()
    logits = lm.prefill(branched, lm.embed(engines.prompt.question_ids("how many cars ?")))
    assert list(generate(lm, branched, logits, Sampling(), (), 4))
    branched.truncate(mark)
    after = [lm.prefill(arena, *_segment(engines, clip[1], 1)) for arena in (clean, branched)]
    assert (after[0] == after[1]).all()
    _same_rows(clean, branched)


def test_evicting_the_newest_equals_never_appended(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    clean, evicted = lm.new_arena(200), lm.new_arena(200)
    for arena in (clean, evicted):
        lm.prefill(arena, *_segment(engines, clip[0], 0))
    start = evicted.length
    lm.prefill(evicted, *_segment(engines, clip[1], 1))
    evicted.evict(start, evicted.length)
    after = [lm.prefill(arena, *_segment(engines, clip[2], 2)) for arena in (clean, evicted)]
    assert (after[0] == after[1]).all()


def test_an_evicted_frame_is_neither_seen_nor_counted(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    """Survivors keep keys, values and positions; what comes later sees only them."""
    lm = engines.language
    arena, bounds = lm.new_arena(200), [0]
    for i, tokens in enumerate(clip[:3]):
        lm.prefill(arena, *_segment(engines, tokens, i))
        bounds.append(arena.length)
    before = [tuple(plane.copy() for plane in arena.rows(layer)) for layer in range(2)]
    positions = arena.positions
    arena.evict(bounds[1], bounds[2])
    left = np.r_[0 : bounds[1], bounds[2] : bounds[3]]
    assert arena.positions.tolist() == positions[left].tolist()
    assert arena.next_position == bounds[3]
    for layer in range(2):
        for now, then in zip(arena.rows(layer), before[layer], strict=True):
            assert (now == then[left]).all()


def test_rows_land_in_the_arena_in_place(engines: LoadedBundle, clip: list[FrameTokens]) -> None:
    lm = engines.language
    arena = lm.new_arena(100)
    keys, values = arena._buffer[1]
    keys[:], values[:] = np.nan, np.nan
    lm.prefill(arena, *_segment(engines, clip[0], 0))
    n = arena.length
    assert np.isfinite(keys[:n]).all()
    assert np.isnan(keys[n:]).all()
    address = keys.__array_interface__["data"][0]
    lm.decode_step(arena, 5)
    assert np.isfinite(values[: n + 1]).all()
    assert np.isnan(values[n + 1 :]).all()
    assert arena.pointers[2] == address


def test_two_conversations_in_turn_equal_each_alone(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    orders = ([0, 1, 2], [3, 4, 5])

    def alone(order: list[int]) -> list[np.ndarray]:
        arena = lm.new_arena(100)
        return [lm.prefill(arena, *_segment(engines, clip[i], i)) for i in order]

    expected = [alone(order) for order in orders]
    arenas = [lm.new_arena(100) for _ in orders]
    for step in range(3):
        for which, order in enumerate(orders):
            i = order[step]
            logits = lm.prefill(arenas[which], *_segment(engines, clip[i], i))
            assert (logits == expected[which][step]).all()


def test_a_full_arena_is_a_typed_error_and_changes_nothing(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    arena = lm.new_arena(20)
    lm.prefill(arena, *_segment(engines, clip[0], 0))
    held = arena.length
    with pytest.raises(KvFull):
        lm.prefill(arena, np.zeros((21 - held, lm.cfg.width), np.float32))
    assert arena.length == held


def test_positions_end_where_the_model_was_trained(engines: LoadedBundle) -> None:
    lm = engines.language
    arena = lm.new_arena()
    arena.append(lm.max_positions - 1)
    for layer in range(lm.cfg.num_layers):
        for rows in arena.rows(layer):
            rows[:] = 0  # fresh memory may hold anything
    arena.evict(0, arena.length - 4)
    lm.decode_step(arena, 1)
    with pytest.raises(PositionsUsedUp):
        lm.decode_step(arena, 1)
    assert arena.length == 5


def test_an_arena_beyond_the_graph_is_refused(engines: LoadedBundle) -> None:
    with pytest.raises(ShapeRange, match="more than the graph's"):
        engines.language.new_arena(TINY_LIMITS["max_past"] + 1)


def test_a_nan_is_a_typed_error_and_changes_nothing(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm = engines.language
    arena = lm.new_arena(100)
    embeds, blocks = _segment(engines, clip[0], 0)
    embeds[0, 0] = np.nan
    with pytest.raises(NonFinite, match="logits"):
        lm.prefill(arena, embeds, blocks)
    assert arena.length == 0


@pytest.mark.parametrize("shape", [(0, 48), (3, 47)])
def test_embeds_of_another_shape_are_refused(engines: LoadedBundle, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="need embeds"):
        engines.language.prefill(engines.language.new_arena(9), np.zeros(shape, np.float32))


@pytest.mark.parametrize("token", [-1, 10_000])
def test_unknown_token_ids_are_refused(engines: LoadedBundle, token: int) -> None:
    with pytest.raises(ValueError, match="token ids"):
        engines.language.embed([0, token])


def test_features_are_added_to_the_patch_tokens(
    engines: LoadedBundle, clip: list[FrameTokens]
) -> None:
    lm, prompt = engines.language, engines.prompt
    tokens = clip[1]
    ids = prompt.frame_ids(0.5, len(tokens.cells), first=False)
    difference = lm.embed(ids, tokens.embeds) - lm.embed(ids)
    places = ids == prompt.patch_id
    np.testing.assert_allclose(difference[places], tokens.embeds, atol=1e-6)
    assert (difference[~places] == 0).all()
    with pytest.raises(ValueError, match="patch tokens"):
        lm.embed(ids[:-2], tokens.embeds)


def test_generate_stops_at_the_end_token_or_the_limit(engines: LoadedBundle) -> None:
    lm = engines.language
    arena = lm.new_arena(100)
    logits = lm.prefill(arena, lm.embed(engines.prompt.bos_ids))
    mark = arena.mark()
    tokens = list(generate(lm, arena, logits, Sampling(), (), 5))
    assert len(tokens) == 5
    assert arena.length == mark + 4  # the last token is not appended
    arena.truncate(mark)
    end = tokens[-1]
    stopped = generate(lm, arena, logits, Sampling(), {end, 10**6}, 5)
    assert list(stopped) == tokens[: tokens.index(end)]
    answer = generate(lm, arena, logits, Sampling(), [tokens[0]], 5)
    with pytest.raises(StopIteration) as stop:
        next(answer)
    assert stop.value.value == "stop"


def test_scores_look_at_the_frame_before(engines: LoadedBundle) -> None:
    vision = engines.vision
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (36, 36, 3), dtype=np.uint8) for _ in range(2)]
    frames = [Frame(rgb=rgb, pts_ns=i, seq=i) for i, rgb in enumerate(pictures)]

    def scores(*order: int) -> np.ndarray:
        state = vision.new_state()
        for i in order:
            tokens = vision.encode(frames[i], state, KeepAll())
        return tokens.scores

    assert (scores(1) != scores(0, 1)).any()
    assert (scores(0, 1) != scores(1, 1)).any()


class _Chosen:
    """A policy that keeps given cells."""

    def __init__(self, *cells: int) -> None:
        self.cells = np.array(cells, np.int32)

    def reset(self) -> None: ...

    def select(self, scores: np.ndarray, rgb: np.ndarray | None, is_first: bool) -> np.ndarray:
        return self.cells


def test_a_frame_may_keep_nothing(engines: LoadedBundle) -> None:
    frame = Frame(rgb=np.zeros((8, 8, 3), np.uint8), pts_ns=0, seq=0)
    tokens = engines.vision.encode(frame, engines.vision.new_state(), _Chosen())
    assert tokens.embeds.shape == (0, engines.language.cfg.width)


@pytest.mark.parametrize("cells", [(1, 0), (2, 2), (-1,), (9,)])
def test_cells_that_do_not_exist_are_refused(engines: LoadedBundle, cells: tuple[int, ...]) -> None:
    frame = Frame(rgb=np.zeros((8, 8, 3), np.uint8), pts_ns=0, seq=0)
    state = engines.vision.new_state()
    with pytest.raises(ValueError, match="kept cells must rise"):
        engines.vision.encode(frame, state, _Chosen(*cells))
    assert state.is_first


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle(), tmp_path / "bundle"))


def _rehash(bundle: Path) -> None:
    """A manifest that vouches for the files as they are now."""
    data = json.loads((bundle / MANIFEST).read_text())
    data["files"] = {name: sha256_of_file(bundle / name) for name in data["files"]}
    (bundle / MANIFEST).write_text(json.dumps(data))


def test_a_graph_that_is_not_onnx_is_a_typed_error(tmp_path: Path) -> None:
    bundle = _copy(tmp_path)
    (bundle / "graphs/llm.onnx").write_bytes(b"not a graph")
    _rehash(bundle)
    with pytest.raises(EngineError, match="cannot load"):
        LoadedBundle.open(bundle)


def test_a_table_of_another_size_is_a_typed_error(tmp_path: Path) -> None:
    bundle = _copy(tmp_path)
    np.save(bundle / EMBED_TABLE, np.zeros((3, 48), np.float32))
    _rehash(bundle)
    with pytest.raises(BundleSchemaError, match="embedding table"):
        LoadedBundle.open(bundle)


def test_a_graph_that_is_not_its_spec_is_a_typed_error(tmp_path: Path) -> None:
    bundle = _copy(tmp_path)
    shutil.copyfile(bundle / "graphs/vit_trunk.onnx", bundle / "graphs/llm.onnx")
    _rehash(bundle)
    with pytest.raises(EngineError, match="its spec"):
        LoadedBundle.open(bundle)


def test_the_engines_need_no_torch() -> None:
    code = (
        "import sys; from edge_vlm_runtime.inference.bundle_model import LoadedBundle; "
        f"LoadedBundle.open({str(tiny_bundle())!r}, threads=1); "
        "print([m for m in ('torch', 'onnx', 'onnxscript') if m in sys.modules])"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={"PYTHONPATH": f"{root}:{root / 'runtime'}"},
    )
    assert result.stdout.strip() == "[]"
