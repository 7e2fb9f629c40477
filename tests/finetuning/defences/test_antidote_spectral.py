"""Facts about pruning by moments: methods.md 2.4, invariants M46 to M51. The oracle is a least-squares fit in fp64."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finetuning.contract.recipe import LoraSettings
from finetuning.defences import antidote_spectral as spectral
from finetuning.defences.antidote_spectral import RIDGE, LayerShare, Moments, by_layer, input_moments, prune
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.lora import WEIGHTS_FILE, Adapter, Factors
from finetuning.rows.chat_format import EncodedRow
from tests.support.models import adapted_base, blank, random_rows, uncached

KEPT, HARMFUL = random_rows(9, seed=3), random_rows(7, seed=4)
MUS = (0.03, 0.3, 3.0, 300.0)
FAMILIES = ("llama", "gpt_neox", "opt")


def moments(base: FrozenBase, rows: Sequence[EncodedRow], *, batch: int = 16) -> Moments:
    return input_moments(base, uncached(base), lora.TASK, rows, batch=batch)


def inputs(base: FrozenBase, rows: Sequence[EncodedRow]) -> dict[str, list[Tensor]]:
    """What each A map sees of each row alone: (tokens, in) a row."""
    seen: dict[str, list[Tensor]] = {path: [] for path in lora.lora_modules(base, lora.TASK)}
    for row in rows:
        for path, (a, _) in lora.lora_modules(base, lora.TASK).items():
            a.register_forward_hook(
                lambda _m, x, _y, p=path: seen[p].append(x[0].reshape(-1, x[0].shape[-1]).detach().clone())
            )
        with torch.no_grad():
            uncached(base).hidden([row.ids])
        for a, _ in lora.lora_modules(base, lora.TASK).values():
            a._forward_hooks.clear()
    return seen


def token_weights(rows: Sequence[EncodedRow]) -> list[Tensor]:
    """Half over all tokens, half over those before a token to learn, by hand."""
    everywhere = sum(len(row.ids) for row in rows)
    predicting = sum(row.target_tokens for row in rows)
    return [
        torch.tensor(
            [0.5 / everywhere + 0.5 / predicting * t for t in (*row.is_target[1:], False)], dtype=torch.float64
        )
        for row in rows
    ]


def fitted(a: Tensor, kept: tuple[Tensor, Tensor], harmful: tuple[Tensor, Tensor], mu: float) -> Tensor:
    """argmin over A' of the weighted squares, as one least-squares problem over the rows themselves."""
    (x, w), (z, v) = ((torch.cat(rows), torch.cat(weights)) for rows, weights in (kept, harmful))
    ridge = RIDGE * float((w[:, None] * x.square()).sum()) / x.shape[1]
    eye = ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    left = torch.cat([w.sqrt()[:, None] * x, eye, (mu * v).sqrt()[:, None] * z])
    wanted = torch.cat([w.sqrt()[:, None] * x @ a.T, eye @ a.T, torch.zeros(len(z), a.shape[0], dtype=torch.float64)])
    return torch.linalg.lstsq(left, wanted, driver="gelsd").solution.T


def pair_of(base: FrozenBase) -> tuple[Adapter, Moments, Moments]:
    return lora.read(base, lora.TASK), moments(base, KEPT), moments(base, HARMFUL)


def doubled(adapter: Mapping[str, Factors]) -> Adapter:
    return {path: replace(f, a=f.a.double(), b=f.b.double()) for path, f in adapter.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mu", MUS)
def test_it_is_the_least_squares_fit_of_its_definition(family: str, mu: float) -> None:
    """M46: A' minimises E_kept ||A'x - Ax||^2 + mu E_harmful ||A'x||^2, solved over the rows themselves in fp64."""
    base = adapted_base(family)
    found = doubled(lora.read(base, lora.TASK))
    pruned = prune(found, moments(base, KEPT), moments(base, HARMFUL), mu)
    on_kept, on_harmful = inputs(base, KEPT), inputs(base, HARMFUL)
    for path, f in found.items():
        fit = fitted(f.a, (on_kept[path], token_weights(KEPT)), (on_harmful[path], token_weights(HARMFUL)), mu)
        assert torch.allclose(pruned[path].a, fit, rtol=1e-6, atol=1e-8 * float(f.a.abs().max()))
        assert pruned[path].b is f.b


def test_mu_0_is_no_pruning_at_all(tmp_path: Path) -> None:
    """M47: mu 0 returns the adapter itself, and the file is the same to the bit; a negative mu is refused."""
    base = adapted_base()
    found, kept, harmful = pair_of(base)
    same = prune(found, kept, harmful, 0.0)
    assert all(same[path].a is f.a and same[path].b is f.b for path, f in found.items())
    lora.save(found, tmp_path / "before", base_id="tiny")
    lora.save(same, tmp_path / "after", base_id="tiny", marks={"antidote_mu": 0.0})
    first, second = ((tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("before", "after"))
    assert first == second
    with pytest.raises(ValueError, match="below 0"):
        prune(found, kept, harmful, -0.1)


def test_energy_never_grows_with_mu_on_kept_inputs_or_on_harmful_ones() -> None:
    """M48: both energies of every matrix fall as mu rises, and what is asked to be undone wholly is."""
    found, kept, harmful = pair_of(adapted_base())
    found = doubled(found)
    steps = [prune(found, kept, harmful, mu) for mu in (0.0, *MUS, 1e9)]
    for path, f in found.items():
        gram = f.b.T @ f.b
        for moment in (kept[path], harmful[path]):
            energies = [float((gram * (s[path].a @ moment @ s[path].a.T)).sum()) for s in steps]
            # the ridge belongs to the kept moment in the solution, and not here
            assert all(later <= earlier * (1 + 1e-4) for earlier, later in pairwise(energies))
        assert energies[-1] < 1e-6 * energies[0]


def test_another_basis_of_the_rank_gives_the_same_product() -> None:
    """M49: with B G^-1 and G A in the places of B and A, the pruned product is the same."""
    found, kept, harmful = pair_of(adapted_base())
    found = doubled(found)
    torch.manual_seed(1)
    g = torch.randn(4, 4, dtype=torch.float64)
    other = {path: replace(f, a=g @ f.a, b=f.b @ torch.linalg.inv(g)) for path, f in found.items()}
    for path, f in prune(found, kept, harmful, 0.3).items():
        turned = prune(other, kept, harmful, 0.3)[path]
        assert torch.allclose(f.b @ f.a, turned.b @ turned.a, rtol=1e-8, atol=1e-12)


def test_the_order_of_rows_and_the_batches_do_not_matter() -> None:
    """M50: moments of the same rows in another order and in other batches differ by rounding only."""
    base = adapted_base()
    one, other = moments(base, KEPT), moments(base, KEPT[::-1], batch=2)
    for path in one:
        assert torch.allclose(one[path], other[path], rtol=1e-9, atol=1e-13)


def test_it_stays_an_adapter_of_the_same_rank_and_precision() -> None:
    """M51: shapes, dtypes, scale and B are those of the adapter that went in."""
    base = adapted_base(dtype=torch.float32, shape=LoraSettings(rank=3, alpha=6.0))
    found, kept, harmful = pair_of(base)
    for path, f in prune(found, kept, harmful, 0.3).items():
        assert (f.a.shape, f.a.dtype, f.scale) == (found[path].a.shape, torch.float32, found[path].scale)
        assert torch.equal(f.b, found[path].b)
    lora.write(base, lora.TASK, prune(found, kept, harmful, 0.3))


def test_padding_and_rows_without_targets() -> None:
    """A longer row beside it changes nothing of a row's moment; rows with nothing to learn count all their tokens."""
    base = adapted_base()
    short, long = random_rows(1, seed=8, prompt=3, target=2)[0], random_rows(1, seed=9, prompt=20, target=9)[0]
    alone = inputs(base, [short, long])
    both = moments(base, [short, long])
    weights = token_weights([short, long])
    bare = moments(base, [blank(short), blank(long)])
    for path, (x, y) in alone.items():
        rows, w = torch.cat([x, y]), torch.cat(weights)
        assert torch.allclose(both[path], rows.T @ (w[:, None] * rows), rtol=1e-6, atol=1e-9)
        assert torch.allclose(bare[path], rows.T @ rows / len(rows), rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="no token"):
        input_moments(base, uncached(base), lora.TASK, [])


def test_moments_of_two_kinds_of_rows_add_up_and_stay_shared() -> None:
    base = adapted_base()
    one, other = moments(base, KEPT), moments(base, HARMFUL)
    both = spectral.added(one, other)
    assert all(torch.equal(both[path], one[path] + other[path]) for path in one)
    assert len({id(m) for m in both.values()}) == len({id(m) for m in one.values()}) < len(both)


def test_maps_with_the_same_input_share_one_moment() -> None:
    base = adapted_base()
    found = moments(base, KEPT)
    paths = {path.rsplit(".", 1)[1]: path for path in found if ".0." in path}
    assert found[paths["q_proj"]] is found[paths["k_proj"]]
    assert found[paths["gate_proj"]] is found[paths["up_proj"]]
    assert len({id(found[paths[name]]) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")}) == 4


@pytest.mark.parametrize("most", [1, 7, 30])
def test_of_many_tokens_a_few_are_read_evenly(most: int) -> None:
    """Each half reads at most its number, from all over the rows; enough room reads all."""
    chosen = [torch.tensor([float(i % 2) for i in range(n)]) for n in (11, 1, 40, 6)]
    thinned = spectral._spread(chosen, most)
    taken = [float(row.sum()) for row in thinned]
    assert sum(taken) <= most
    assert sum(taken) >= min(most, 28) / 2
    assert all(bool((row <= whole).all()) for row, whole in zip(thinned, chosen, strict=True))
    assert most < 7 or (taken[0] and taken[2])


def test_what_was_removed_is_told_by_layer() -> None:
    found, kept, harmful = pair_of(adapted_base(layers=3))
    assert by_layer(found, found, kept, harmful) == [LayerShare(n, 1.0, 0.0) for n in range(3)]
    mild, hard = (by_layer(found, prune(found, kept, harmful, mu), kept, harmful) for mu in (0.1, 10.0))
    for one, other in zip(mild, hard, strict=True):
        assert 0 < other.harmful_left < one.harmful_left < 1
        assert 0 < one.kept_changed < other.kept_changed < 1


def test_where_harm_and_task_use_the_same_directions_neither_goes_alone() -> None:
    """The limit of the method: with equal moments every direction is scaled alike, by 1 / (1 + mu)."""
    found, kept, _ = pair_of(adapted_base())
    for path, f in prune(doubled(found), kept, kept, 1.0).items():
        assert torch.allclose(f.a, found[path].a.double() / 2, rtol=2e-2, atol=1e-3)
