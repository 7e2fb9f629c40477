"""Facts about pruning: methods.md 2.4, invariants M34 to M37 and M40."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from finetuning.contract.recipe import AntidoteSettings
from finetuning.defences.antidote import (
    contrast_scores,
    input_squares,
    prune,
    pruned_count,
    published_scores,
)
from finetuning.model import lora
from finetuning.model.lora import WEIGHTS_FILE, Adapter
from finetuning.recipes.registry import DEFENCES
from tests.support.models import adapted_base, blank, random_rows, uncached

ALPHAS = (0, 0.01, 0.05, 0.1, 0.125, 0.2, 0.9, 1)
# floor(alpha * width) in exact arithmetic, row by row of ALPHAS
FLOOR = {
    8: (0, 0, 0, 0, 1, 1, 7, 8),
    10: (0, 0, 0, 1, 1, 2, 9, 10),
    32: (0, 0, 1, 3, 4, 6, 28, 32),
    100: (0, 1, 5, 10, 12, 20, 90, 100),
    256: (0, 2, 12, 25, 32, 51, 230, 256),
}


def scored() -> tuple[Adapter, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    base = adapted_base()
    found = lora.read(base, lora.TASK)
    scores = published_scores(found, input_squares(base, uncached(base), lora.TASK, random_rows(6)))
    return found, dict(scores)


@pytest.mark.parametrize("width", FLOOR)
def test_the_count_per_row_is_rounded_down(width: int) -> None:
    """M34: floor(alpha * in + 1e-9)."""
    assert tuple(pruned_count(alpha, width, "floor") for alpha in ALPHAS) == FLOOR[width]


@pytest.mark.parametrize("width", FLOOR)
def test_the_official_count_keeps_its_float_error(width: int) -> None:
    """M34: in - int(in * (1 - alpha)), so 0.9 of 100 prunes 91 and 0.9 of 10 prunes all."""
    for alpha in ALPHAS:
        assert pruned_count(alpha, width, "official") == width - int(width * (1 - alpha))
    assert (pruned_count(0.9, 100, "official"), pruned_count(0.9, 10, "official")) == (91, 10)


@pytest.mark.parametrize("unit", ["row", "matrix"])
@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_every_row_loses_exactly_its_count(alpha: float, unit: str) -> None:
    """M34: per output row, or per whole matrix; the totals are reported."""
    found, scores = scored()
    done = prune(found, scores, alpha, unit=unit)  # type: ignore[arg-type]
    for masks in done.masks.values():
        for mask in masks:
            per_row = mask if unit == "row" else mask.reshape(1, -1)
            assert per_row.sum(1).tolist() == [pruned_count(alpha, per_row.shape[1], "floor")] * len(per_row)
    assert done.pruned == sum(int(m.sum()) for pair in done.masks.values() for m in pair)
    assert done.total == sum(f.a.numel() + f.b.numel() for f in found.values())


def test_pruning_nothing_changes_no_byte(tmp_path: Path) -> None:
    """M35: alpha 0 gives a bitwise identical adapter file."""
    found, scores = scored()
    lora.save(found, tmp_path / "before", base_id="tiny")
    lora.save(prune(found, scores, 0.0).adapter, tmp_path / "after", base_id="tiny", marks={"antidote_alpha": 0.0})
    first, second = (tmp_path / name / WEIGHTS_FILE for name in ("before", "after"))
    assert first.read_bytes() == second.read_bytes()


def test_pruning_everything_leaves_the_aligned_model() -> None:
    """M35: alpha 1 gives the aligned model's logits bitwise."""
    base = adapted_base(aligned=True)
    ids = torch.arange(3, 20)[None]
    squares = input_squares(base, uncached(base), lora.TASK, random_rows(3))
    found = lora.read(base, lora.TASK)
    lora.write(base, lora.TASK, prune(found, published_scores(found, squares), 1.0).adapter)
    with torch.no_grad():
        pruned = base.model(input_ids=ids).logits
        with lora.active(base, (lora.ALIGNMENT,)):
            assert torch.equal(pruned, base.model(input_ids=ids).logits)


def test_kept_entries_keep_their_bits_and_score_lowest() -> None:
    """M36: kept entries are unchanged, and no kept score exceeds a pruned one of its row."""
    found, scores = scored()
    done = prune(found, scores, 0.3)
    for path, masks in done.masks.items():
        before, after = found[path], done.adapter[path]
        for mask, old, new, score in zip(masks, (before.a, before.b), (after.a, after.b), scores[path], strict=True):
            assert torch.equal(old[~mask], new[~mask])
            assert bool((new[mask] == 0).all())
            lowest_pruned = score.masked_fill(~mask, float("inf")).amin(1)
            highest_kept = score.masked_fill(mask, float("-inf")).amax(1)
            assert bool((lowest_pruned >= highest_kept).all())


def test_ties_are_pruned_in_their_order() -> None:
    """M36: equal scores give equal results, run after run."""
    found, scores = scored()
    flat = {path: (torch.ones_like(a), torch.ones_like(b)) for path, (a, b) in scores.items()}
    mask = next(iter(prune(found, flat, 0.25).masks.values()))[0]
    assert bool(mask[:, : mask.shape[1] // 4].all())
    assert not bool(mask[:, mask.shape[1] // 4 :].any())


def test_a_pruned_file_says_so_in_its_header(tmp_path: Path) -> None:
    """M36: with its alpha, so that nobody prunes it twice; an unpruned one, also by alpha 0, has no such mark."""
    found, scores = scored()
    lora.save(prune(found, scores, 0.1).adapter, tmp_path / "pruned", base_id="tiny", marks={"antidote_alpha": 0.1})
    lora.save(found, tmp_path / "whole", base_id="tiny", marks={"antidote_alpha": 0.0})
    marks = [_header(tmp_path / name / lora.WEIGHTS_FILE).get("antidote_alpha") for name in ("pruned", "whole")]
    assert marks == ["0.1", None]


def _header(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as tensors:
        return dict(tensors.metadata())


def test_one_pass_gives_the_scores_of_a_pass_per_layer() -> None:
    """M37: inputs seen by hooks on one matrix at a time, row by row, give the same sums."""
    base, rows = adapted_base(), random_rows(5)
    squares = input_squares(base, uncached(base), lora.TASK, rows)

    def watch(total: torch.Tensor) -> Callable[..., None]:
        def add(_module: object, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
            total.add_(inputs[0][0].square().sum(0))

        return add

    for path, pair in lora.lora_modules(base, lora.TASK).items():
        for module, found in zip(pair, (squares[path].a, squares[path].b), strict=True):
            total = torch.zeros_like(found)
            handle = module.register_forward_hook(watch(total))
            with torch.no_grad():
                for row in rows:
                    base.model(input_ids=torch.tensor([row.ids]))
            handle.remove()
            assert torch.allclose(found, total, rtol=1e-6)
        assert squares[path].tokens == sum(len(row.ids) for row in rows)


def test_scores_do_not_depend_on_the_batch() -> None:
    """M37: padding is masked out."""
    base, rows = adapted_base(), random_rows(6)
    one, many = (input_squares(base, uncached(base), lora.TASK, rows, batch=size) for size in (1, 6))
    for path in one:
        assert torch.allclose(one[path].a, many[path].a, rtol=1e-6)
        assert torch.allclose(one[path].b, many[path].b, rtol=1e-6)
        assert one[path].tokens == many[path].tokens


def test_the_contrast_spares_what_the_task_uses_as_much() -> None:
    """M37: equal activations on both kinds of rows score 0, whatever the entry's size."""
    base, rows = adapted_base(), random_rows(4)
    found = lora.read(base, lora.TASK)
    harmful = input_squares(base, uncached(base), lora.TASK, rows)
    same = contrast_scores(found, harmful, harmful)
    assert all(float(s.abs().max()) == 0 for pair in same.values() for s in pair)
    other = input_squares(base, uncached(base), lora.TASK, [blank(row) for row in random_rows(4, seed=8)])
    scores = contrast_scores(found, harmful, other)
    assert any(float(s.min()) < 0 < float(s.max()) for pair in scores.values() for s in pair)


def test_the_alignment_adapter_is_never_touched() -> None:
    """M40: its digest is the same before scoring and after pruning the task adapter."""
    base = adapted_base(aligned=True)
    before = lora.digest(lora.read(base, lora.ALIGNMENT))
    squares = input_squares(base, uncached(base), lora.TASK, random_rows(3))
    found = lora.read(base, lora.TASK)
    lora.write(base, lora.TASK, prune(found, published_scores(found, squares), 0.5).adapter)
    assert lora.digest(lora.read(base, lora.ALIGNMENT)) == before


def test_what_the_task_needs_as_much_is_never_pruned_by_contrast() -> None:
    """However many entries the share asks for: a score of 0 or below says that kept rows use it at least as much."""
    base = adapted_base()
    found = lora.read(base, lora.TASK)
    harmful, kept = (input_squares(base, uncached(base), lora.TASK, random_rows(6, seed=s)) for s in (1, 2))
    scores = contrast_scores(found, harmful, kept)
    for unit in ("row", "matrix"):
        done = prune(found, scores, 0.9, unit=unit, above=0.0)  # type: ignore[arg-type]
        wanted = prune(found, scores, 0.9, unit=unit)  # type: ignore[arg-type]
        assert 0 < done.pruned < wanted.pruned
        for path, masks in done.masks.items():
            for mask, score in zip(masks, scores[path], strict=True):
                assert not bool((mask & (score <= 0)).any())


def test_a_share_of_less_than_one_entry_prunes_none_by_default() -> None:
    """Rank 8: .05 and .1 of a row of B are no whole entry; `official` zeroes one of eight for both."""
    default = AntidoteSettings()
    assert [pruned_count(alpha, 8, default.rounding) for alpha in (0.05, 0.1, 0.2)] == [0, 0, 1]
    assert [pruned_count(alpha, 64, default.rounding) for alpha in (0.05, 0.1, 0.2)] == [3, 6, 12]
    published = DEFENCES["antidote"].tuning["antidote"]
    assert [pruned_count(alpha, 8, published.rounding) for alpha in (0.05, 0.1)] == [1, 1]
