"""Facts about states below the trained layers: computed once, kept in bounded room, and changing no bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetuning.contract.recipe import LoraSettings, OptimiserSettings
from finetuning.defences.plain import Plain
from finetuning.defences.screen_weights import ScreenWeights
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.packed_linear import PackedLinear, pack
from finetuning.model.prefix_cache import PrefixCache
from finetuning.rows.chat_format import EncodedRow
from finetuning.training.batches import Stream
from finetuning.training.loop import train
from finetuning.training.state import LoopState, TrainSetup
from tests.support.models import adapted_base, farthest, random_rows

TOP = LoraSettings(rank=4, alpha=8.0, trained_layers=1)
GROUP = 8  # rows that the cache computes together


def top_trained(family: str = "llama") -> FrozenBase:
    return adapted_base(family, layers=3, shape=TOP, dtype=torch.float32)


CacheOf = Callable[[FrozenBase], PrefixCache]


def trained_with(cache_of: CacheOf, rows: list[EncodedRow], *, micro: int) -> list[torch.Tensor]:
    """The adapter after some steps over whatever cache is made."""
    base = top_trained()
    setup = TrainSetup(
        rows=rows, batches=Stream(len(rows), 8, 0), step=Plain(base, cache_of(base)),
        weigher=ScreenWeights(torch.ones(len(rows)), min_share=0.25), parameters=lora.parameters(base, lora.TASK),
        optimiser=OptimiserSettings(learning_rate=1e-2), steps=6, micro_batch_size=micro, seed=0,
    )  # fmt: skip
    list(train(setup, LoopState()))
    return [p.detach().clone() for p in setup.parameters]


def test_a_cut_with_a_mapped_file_trains_the_same_bits(tmp_path: Path) -> None:
    """M45: steps over cached states equal steps that run every layer, to the bit, where both see one shape."""
    rows = random_rows(20, prompt=9, target=7)
    plain = trained_with(lambda base: PrefixCache(base, 0), rows, micro=GROUP)
    cached = trained_with(lambda base: PrefixCache(base, 2, folder=tmp_path), rows, micro=GROUP)
    assert all(torch.equal(a, b) for a, b in zip(plain, cached, strict=True))


def test_a_cut_trains_the_same_adapter_whatever_the_shapes(tmp_path: Path) -> None:
    """M45: with rows of many lengths only a matrix product's last bits differ."""
    plain = trained_with(lambda base: PrefixCache(base, 0), random_rows(10), micro=3)
    cached = trained_with(lambda base: PrefixCache(base, 2, folder=tmp_path), random_rows(10), micro=3)
    assert farthest(plain, cached) < 1e-4


@pytest.mark.parametrize("room", [1 << 20, 4 * 32 * 20, 0])
def test_room_changes_no_bit(room: int, tmp_path: Path) -> None:
    """M45: in memory, on disk, with hardly any room or none: the same adapter."""
    kept = trained_with(lambda base: PrefixCache(base, 2), random_rows(10), micro=3)
    folder = tmp_path if room else None
    again = trained_with(lambda base: PrefixCache(base, 2, folder=folder, max_bytes=room), random_rows(10), micro=3)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


@pytest.mark.parametrize("hidden", [32, 320])
def test_states_do_not_depend_on_order_or_company(hidden: int) -> None:
    """M45: a row's states are its own, whoever was computed with it; so with packed maps, which the larger base has."""
    base = adapted_base(layers=3, shape=TOP, hidden=hidden, dtype=torch.float32)
    pack(base.model)
    assert any(isinstance(module, PackedLinear) for module in base.layers.modules()) == (hidden == 320)
    rows = [row.ids for row in random_rows(8)]
    first, second, third = (PrefixCache(base, 2) for _ in range(3))
    first.prepare(rows)
    second.prepare(list(reversed(rows)))
    for row in rows:
        alone = third.states([row])
        assert torch.equal(first.states([row]), alone)
        assert torch.equal(second.states([row]), alone)
    batch = first.states(rows)
    for i, row in enumerate(rows):
        assert torch.equal(batch[i, : len(row)], third.states([row])[0])
        assert float(batch[i, len(row) :].abs().sum()) == 0


def test_room_on_disk_is_bounded(tmp_path: Path) -> None:
    base, rows = top_trained(), [row.ids for row in random_rows(30)]
    cache = PrefixCache(base, 2, folder=tmp_path, max_bytes=4 * 32 * 50)
    cache.prepare(rows)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size <= 4 * 32 * 50
    assert torch.equal(cache.states(rows), PrefixCache(base, 2).states(rows))


def test_the_same_row_is_computed_once() -> None:
    base, rows = top_trained(), [row.ids for row in random_rows(3, prompt=4, target=4)]
    calls: list[int] = []
    base.layers[0].register_forward_hook(lambda *_: calls.append(1))
    cache = PrefixCache(base, 2)
    cache.prepare([*rows, *rows])
    assert len(calls) == 1  # one group of one length
    cache.hidden(rows)
    cache.prepare(rows)
    assert len(calls) == 1


def test_long_rows_of_many_lengths_are_computed_without_fillers() -> None:
    """A file of long texts has a length class for nearly every row: groups filled up would be most of the work."""
    base = top_trained()
    rows = [row.ids for n in range(12) for row in random_rows(1, prompt=200 + 9 * n, target=8)]
    computed: list[int] = []
    base.layers[0].register_forward_hook(lambda _module, inputs, _output: computed.append(inputs[0][..., 0].numel()))
    PrefixCache(base, 2).prepare(rows)
    assert sum(computed) <= 1.05 * sum(map(len, rows))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_lower_layers_are_back_after_use_and_after_errors(family: str) -> None:
    base = top_trained(family)
    layers = list(base.layers)
    cache = PrefixCache(base, 2)
    rows = [row.ids for row in random_rows(2)]
    cache.hidden(rows)
    assert all(a is b for a, b in zip(layers, base.layers, strict=True))
    with pytest.raises(RuntimeError, match="stop"), cache.injected(cache.states(rows)):
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip(layers, base.layers, strict=True))


def test_gradients_reach_only_layers_above_the_cut() -> None:
    base = top_trained()
    PrefixCache(base, 2).hidden([row.ids for row in random_rows(2)]).sum().backward()
    trained = lora.parameters(base, lora.TASK)
    assert all(p.grad is not None for p in trained)
    assert len([p for p in base.model.parameters() if p.grad is not None]) == len(trained)
