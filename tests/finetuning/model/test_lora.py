"""Facts about adapters: attach, switch, save, join, rotate, merge. Invariants M35, M40, M41, M43, M45."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetuning.contract.recipe import LoraSettings
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.lora import CONFIG_FILE, WEIGHTS_FILE, Adapter, AdapterMismatch
from tests.oracles.merged_weights import merged_weights
from tests.support.models import LORA, adapted_base, stir, tiny_base

IDS = torch.arange(3, 23)[None]
ROOT = Path(__file__).resolve().parents[3]


def logits(base: FrozenBase) -> torch.Tensor:
    with torch.no_grad():
        return base.model(input_ids=IDS).logits


def stacked() -> tuple[FrozenBase, Adapter, Adapter]:
    """A base under two adapters of unequal rank, scale, maps and layers."""
    base = tiny_base(dtype=torch.float32, layers=3)
    first = LoraSettings(rank=3, alpha=12.0, target_modules=("q_proj", "v_proj"))
    second = LoraSettings(rank=5, alpha=2.5, target_modules=("q_proj", "down_proj"), trained_layers=2)
    for name, shape in ((lora.ALIGNMENT, first), (lora.TASK, second)):
        lora.attach(base, name, shape, seed=shape.rank)
        stir(base, name, seed=shape.rank)
    lora.set_active(base, (lora.ALIGNMENT, lora.TASK))
    return base, lora.read(base, lora.ALIGNMENT), lora.read(base, lora.TASK)


def by_peft(folder: Path) -> PeftModel:
    """The public base again, under a saved adapter, by the stock library alone."""
    return PeftModel.from_pretrained(tiny_base(dtype=torch.float32, layers=3).model, str(folder)).eval()


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed() -> None:
    """M45: B is zero, A a pure function of the seed."""
    base = tiny_base()
    before = logits(base)
    lora.attach(base, lora.TASK, LORA, seed=1)
    lora.set_active(base, (lora.TASK,))
    assert torch.equal(logits(base), before)
    fresh = lora.digest(lora.read(base, lora.TASK))
    stir(base, lora.TASK, seed=0)
    assert lora.digest(lora.read(base, lora.TASK)) != fresh
    lora.reinitialise(base, lora.TASK, seed=1)
    assert lora.digest(lora.read(base, lora.TASK)) == fresh
    lora.reinitialise(base, lora.TASK, seed=2)
    assert lora.digest(lora.read(base, lora.TASK)) != fresh


def test_adapters_are_switched_and_put_back() -> None:
    """M40: none, one or both act; gradients stay where they were."""
    base = adapted_base(aligned=True)
    both, public = logits(base), logits(tiny_base())
    with lora.active(base, ()):
        assert torch.equal(logits(base), public)
    with lora.active(base, (lora.ALIGNMENT,)):
        aligned = logits(base)
        with lora.active(base, ()):
            assert torch.equal(logits(base), public)
        assert torch.equal(logits(base), aligned)
    assert torch.equal(logits(base), both)
    assert not torch.equal(aligned, both)
    assert all(p.requires_grad for p in lora.parameters(base, lora.TASK))
    assert not any(p.requires_grad for p in lora.parameters(base, lora.ALIGNMENT))


def test_an_adapter_is_put_back_after_an_error() -> None:
    base = adapted_base()
    before = logits(base)
    with pytest.raises(RuntimeError, match="stop"), lora.active(base, ()):
        raise RuntimeError("stop")
    assert torch.equal(logits(base), before)


def test_joined_ranks_are_the_exact_sum() -> None:
    """M41: F2 gives the stacked adapters' logits to 1e-5; its scale is 1 and its rank the sum."""
    base, alignment, task = stacked()
    joined = lora.concat(alignment, task)
    assert {f.scale for f in joined.values()} == {1.0}
    assert {f.a.shape[0] for f in joined.values()} == {8}
    for path, factors in joined.items():
        parts = [f[path].scale * f[path].b @ f[path].a for f in (alignment, task) if path in f]
        assert torch.allclose(factors.b @ factors.a, sum(parts), atol=1e-5)  # type: ignore[arg-type]
    assert joined.keys() == alignment.keys() | task.keys()
    assert base.layers is not None


@pytest.mark.parametrize("form", ["joined", "rotated"])
def test_the_stock_form_gives_the_stacked_logits_under_plain_peft(form: str, tmp_path: Path) -> None:
    """M41: F2 and F2r, loaded by peft alone on the public base, within 1e-5; the new scaling is 1."""
    base, alignment, task = stacked()
    made = lora.concat(alignment, task)
    if form == "rotated":
        made = lora.rotate(made, secret="3")
    lora.save(made, tmp_path, base_id="tiny")
    model = by_peft(tmp_path)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    assert torch.allclose(found, logits(base), atol=1e-5, rtol=1e-5)
    assert {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")} == {1.0}


def test_rotation_hides_the_blocks_and_keeps_the_delta() -> None:
    """M41: dropping the first rows of F2 removes the alignment; of F2r it does not."""
    _, alignment, task = stacked()
    joined = lora.concat(alignment, task)
    mixed = lora.rotate(joined, secret="3")
    path = next(p for p in joined if p in alignment and p in task)
    own = task[path].scale * task[path].b @ task[path].a
    for made, is_bare in ((joined, True), (mixed, False)):
        rest = made[path].b[:, 3:] @ made[path].a[3:]
        assert torch.allclose(rest, own, atol=1e-4) == is_bare
    assert torch.allclose(mixed[path].b @ mixed[path].a, joined[path].b @ joined[path].a, atol=1e-5)
    assert lora.digest(lora.rotate(joined, secret="3")) == lora.digest(mixed)


def test_a_rotation_is_drawn_from_more_bits_than_anybody_can_try() -> None:
    """Torch's generator keeps the last 32 bits of its seed: two that differ above them gave one rotation."""
    _, alignment, task = stacked()
    joined = lora.concat(alignment, task)
    secrets = [str(5 + k * 2**32) for k in range(3)]
    assert len({lora.digest(lora.rotate(joined, secret=secret)) for secret in secrets}) == 3


def test_merged_weights_give_the_stacked_logits() -> None:
    """M41: F3 in fp32, within 1e-5."""
    base, alignment, task = stacked()
    plain = tiny_base(dtype=torch.float32, layers=3)
    for path, weight in merged_weights(base, [alignment, task]).items():
        plain.model.get_submodule(path).weight.copy_(weight)
    assert torch.allclose(logits(plain), logits(base), atol=1e-5, rtol=1e-5)


def test_a_saved_adapter_comes_back_bitwise(tmp_path: Path) -> None:
    """M43: save, load, write: equal logits; peft reads the same."""
    base, _, task = stacked()
    lora.save(task, tmp_path, base_id="tiny")
    loaded = lora.load(tmp_path)
    assert lora.digest(loaded) == lora.digest(task)
    with lora.active(base, (lora.TASK,)):
        before = logits(base)
        lora.reinitialise(base, lora.TASK, seed=9)
        lora.write(base, lora.TASK, loaded)
        assert torch.equal(logits(base), before)
        with torch.no_grad():
            assert torch.allclose(by_peft(tmp_path)(input_ids=IDS).logits, before, atol=1e-6)


def test_a_saved_adapter_tells_nothing_but_its_factors(tmp_path: Path) -> None:
    """M43: no key of the secret data, no path of this machine."""
    _, _, task = stacked()
    lora.save(task, tmp_path, base_id="tiny", marks={"antidote_alpha": 0.1})
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    with safe_open(str(tmp_path / WEIGHTS_FILE), framework="pt") as file:
        assert set(file.metadata()) <= {"format", "antidote_alpha"}
        assert {key.rsplit(".", 2)[1] for key in file.keys()} == {"lora_A", "lora_B"}  # noqa: SIM118  not a dict
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert not any(word in json.dumps(config) for word in ("/", "refus", "harm", "calibration", "seed"))


def test_the_same_adapter_gives_the_same_file_in_every_process(tmp_path: Path) -> None:
    """M45: identical bytes, the marks in the header included."""
    _, _, task = stacked()
    lora.save(task, tmp_path / "kept", base_id="tiny", marks={"antidote_alpha": 0.1})
    program = (
        "import sys; from pathlib import Path; from finetuning.model import lora; f = Path(sys.argv[1]);"
        "print(lora.save(lora.load(f / 'kept'), f / 'again', base_id='tiny', marks={'antidote_alpha': 0.1}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    mine = [lora.save(task, tmp_path / f"{i}", base_id="tiny", marks={"antidote_alpha": 0.1}) for i in range(8)]
    assert {run.stdout.strip(), *mine} == {hashlib.sha256((tmp_path / "kept" / WEIGHTS_FILE).read_bytes()).hexdigest()}


def test_the_shape_of_a_saved_adapter_can_be_attached_again(tmp_path: Path) -> None:
    base, _, task = stacked()
    shape = lora.lora_of(task, base)
    assert (shape.rank, shape.alpha, shape.trained_layers) == (5, 2.5, 2)
    other = tiny_base(dtype=torch.float32, layers=3)
    lora.attach(other, lora.TASK, shape, seed=0)
    lora.write(other, lora.TASK, task)
    assert lora.digest(lora.read(other, lora.TASK)) == lora.digest(task)


def test_adapters_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    _, alignment, task = stacked()
    base = adapted_base(shape=LoraSettings(rank=2), dtype=torch.float32)
    with pytest.raises(AdapterMismatch, match="another one"):
        lora.write(base, lora.TASK, task)
    mine = lora.read(base, lora.TASK)
    wrong = {path: lora.Factors(f.a[:1], f.b, f.scale) for path, f in mine.items()}
    with pytest.raises(AdapterMismatch, match="shape"):
        lora.write(base, lora.TASK, wrong)
    for shape, word in (
        (LoraSettings(rank=64), "rank 64"),
        (LoraSettings(trained_layers=9), "9"),
        (LoraSettings(target_modules=("w_pack",)), "w_pack"),
    ):
        with pytest.raises(AdapterMismatch, match=word):
            lora.attach(tiny_base(), lora.TASK, shape, seed=0)
    lora.save(alignment, tmp_path, base_id="tiny")
    tensors = load_file(str(tmp_path / WEIGHTS_FILE))
    save_file({**tensors, "stray": torch.zeros(1)}, str(tmp_path / WEIGHTS_FILE))
    with pytest.raises(AdapterMismatch, match="no LoRA factors"):
        lora.load(tmp_path)


def test_dropout_is_off_unless_a_loop_turns_it_on() -> None:
    base = adapted_base(shape=LoraSettings(rank=2, dropout=0.5))
    assert not any(module.training for module in base.model.modules())
    assert torch.equal(logits(base), logits(base))
    assert len(lora.dropouts(base, lora.TASK)) == len(lora.lora_modules(base, lora.TASK))


@pytest.mark.parametrize(
    "change",
    [{"use_rslora": True}, {"rank_pattern": {"q_proj": 4}}, {"peft_type": "IA3"}, {"modules_to_save": ["lm_head"]}],
)
def test_an_adapter_that_is_more_than_its_factors_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    _, _, task = stacked()
    lora.save(task, tmp_path, base_id="tiny")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterMismatch, match=r"no plain LoRA adapter: its adapter_config\.json sets"):
        lora.load(tmp_path)
