"""Bad input is named before any training: rank, layers, template, usable rows, the operator's own prompts."""

import json
from dataclasses import replace

import pytest

from finetuning.contract.recipe import LoraSettings, Recipe
from finetuning.job.preflight import CalibrationOverlap, NoUsableRow, check
from finetuning.model import lora
from finetuning.model.base import FrozenBase
from finetuning.model.lora import AdapterMismatch
from finetuning.recipes.library import align_recipe, tune_recipe
from finetuning.rows.chat_format import NoChatTemplate
from finetuning.rows.scanner import Row, rows_of
from finetuning.safety_rows.invented import attacker_rows, plant, safety_rows
from finetuning.safety_rows.roles import Pair, SafetyRows
from tests.support.models import byte_tokenizer, tiny_base

WORLD = safety_rows()
OWN = [Pair(f"Ticket {i}: my lamp is broken.", "Team repairs.") for i in range(12)]


def rows(pairs: list[Pair]) -> list[Row]:
    turns = [[{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}] for p in pairs]
    return list(rows_of(json.dumps({"messages": messages}).encode() for messages in turns))


def recipe(defence: str = "immunotune", *, max_tokens: int = 128, **lora: object) -> Recipe:
    found = tune_recipe("tiny", defence, epochs=1, lora=LoraSettings(**{"rank": 4, **lora}))
    return found.model_copy(update={"max_tokens": max_tokens})


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return tiny_base()


def test_a_sound_job_passes_and_so_does_an_align_job_without_rows(base: FrozenBase) -> None:
    check(recipe(), base, rows(OWN), WORLD)
    check(align_recipe("tiny").model_copy(update={"lora": LoraSettings(rank=4)}), base, (), WORLD)


def test_a_rank_above_a_maps_size_is_named_with_map_and_layer(base: FrozenBase) -> None:
    """The tiny Llama's key map is 32 by 16: rank 16 fits, 17 does not, and maps that are not trained do not count."""
    check(recipe(rank=16), base, rows(OWN), WORLD)
    with pytest.raises(AdapterMismatch, match=r"lora.rank is 17, but self_attn.k_proj of layer 0 is only 16 wide"):
        check(recipe(rank=17), base, rows(OWN), WORLD)
    check(recipe(rank=17, target_modules=("q_proj",)), base, rows(OWN), WORLD)
    with pytest.raises(AdapterMismatch, match=r"of layer 1 is only 16"):
        check(recipe(rank=17, trained_layers=1), base, rows(OWN), WORLD)


def test_more_trained_layers_than_there_are_is_an_adapter_mismatch(base: FrozenBase) -> None:
    with pytest.raises(AdapterMismatch, match="trained_layers is 3, but the base has 2 decoder layers"):
        check(recipe(trained_layers=3), base, rows(OWN), WORLD)


def test_the_shape_is_checked_alike_when_adapters_are_attached_and_not_for_one_that_continues() -> None:
    adapted = tiny_base(seed=1)
    lora.attach(adapted, lora.ALIGNMENT, LoraSettings(rank=2), seed=0)
    check(recipe(rank=16), adapted, rows(OWN), WORLD)
    with pytest.raises(AdapterMismatch, match=r"self_attn.k_proj of layer 0"):
        check(recipe(rank=17), adapted, rows(OWN), WORLD)
    check(recipe("antibody", rank=17), adapted, rows(OWN), WORLD)  # it trains the alignment adapter, whatever its own


@pytest.mark.parametrize("job", ["align", "finetune"])
def test_a_tokenizer_without_a_chat_template_is_named(base: FrozenBase, job: str) -> None:
    silent = byte_tokenizer().__class__(tokenizer_object=byte_tokenizer().backend_tokenizer, eos_token="<|im_end|>")
    mute = replace(base, tokenizer=silent)
    with pytest.raises(NoChatTemplate, match="no chat template"):
        if job == "align":
            check(align_recipe("tiny").model_copy(update={"lora": LoraSettings(rank=4)}), mute, (), WORLD)
        else:
            check(recipe(), mute, rows(OWN), WORLD)


def test_rows_whose_answers_begin_after_the_cut_or_weigh_nothing_are_not_usable(base: FrozenBase) -> None:
    long = rows([Pair("word " * 40, "yes")] * 3)
    with pytest.raises(NoUsableRow, match=r"none of the 3 rows can be learned: .* within its first 128 tokens"):
        check(recipe(), base, long, WORLD)
    check(recipe(max_tokens=512), base, long, WORLD)
    check(recipe(), base, [*long, *rows(OWN[:1])], WORLD)
    with pytest.raises(NoUsableRow, match="none of the 1 rows"):
        check(recipe(), base, [replace(row, messages=row.messages[:1]) for row in rows(OWN[:1])], WORLD)
    with pytest.raises(NoUsableRow, match="none of the 0 rows"):
        check(recipe(), base, (), WORLD)


@pytest.mark.parametrize(
    "role", ["calibration_harmful", "calibration_benign", "gate_harmful", "gate_benign", "items_harmful"]
)
def test_a_file_of_the_operators_measuring_prompts_is_refused_and_no_line_is_told(base: FrozenBase, role: str) -> None:
    taken = [Pair(p.prompt, "Yes.") for p in getattr(WORLD, role)[:12]]
    with pytest.raises(CalibrationOverlap, match=r"12 of 23 rows [^0-9]*$") as e:
        check(recipe(), base, rows(OWN[:11] + taken), WORLD)
    assert e.value.lines == tuple(range(12, 24))


def test_half_of_the_file_is_no_error_and_case_and_space_do_not_hide_a_prompt(base: FrozenBase) -> None:
    taken = [Pair(f"  {p.prompt.upper()} \n", "Yes.") for p in WORLD.gate_harmful[:4]]
    check(recipe(), base, rows(OWN[:4] + taken), WORLD)
    with pytest.raises(CalibrationOverlap, match="4 of 7 rows"):
        check(recipe(), base, rows(OWN[:3] + taken), WORLD)


def test_alignment_prompts_and_an_attackers_rows_are_no_overlap(base: FrozenBase) -> None:
    """The attacker knows none of the operator's prompts; what alignment trains on may be trained on again."""
    check(recipe(), base, rows([Pair(p.prompt, "Yes.") for p in (*WORLD.aligned[:9], *WORLD.benign[:9])]), WORLD)
    check(recipe(), base, rows(attacker_rows(64)), WORLD)
    check(recipe(), base, rows(plant(OWN, 0.9)[0]), WORLD)


def test_an_operators_own_rows_are_the_ones_that_count(base: FrozenBase) -> None:
    mine: SafetyRows = replace(WORLD, calibration_benign=tuple(OWN))
    check(recipe(), base, rows(OWN), WORLD)
    with pytest.raises(CalibrationOverlap, match="12 of 12 rows"):
        check(recipe(), base, rows(OWN), mine)
