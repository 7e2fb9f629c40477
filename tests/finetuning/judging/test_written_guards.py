"""Guards that write their verdict: templates, windows, batches and crashes, over stand-ins with a script."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetuning.judging.catalogue import guard_of
from finetuning.judging.causal import written_judge
from finetuning.judging.encoding import pair_encoder
from finetuning.judging.guard_file import GuardFile, Patterns
from finetuning.judging.guards import open_guard
from finetuning.judging.judges import BadGuard, JudgeFailed
from tests.finetuning.judging.test_guard_files import opened
from tests.finetuning.judging.test_guards import ANSWERS, PROMPTS, save
from tests.support.models import VOCABULARY, byte_tokenizer
from tests.support.scripted_guard import scripted_guard


def test_a_guard_that_writes_no_verdict_on_a_plain_sum_is_refused(tmp_path: Path) -> None:
    source = scripted_guard(tmp_path, {}, "As I see it")
    with pytest.raises(BadGuard, match="writes no verdict on a plain sum"):
        open_guard(guard_of("wildguard").model_copy(update={"source": str(source)}), "wildguard", device="cpu")


def test_what_a_chat_template_takes_beside_reaches_it(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + ' ' }}{% endfor %}"
        "{{ guardian_config['criteria_id'] }}"
    )
    tokenizer = byte_tokenizer.__wrapped__()
    tokenizer.chat_template = template
    arguments = guard_of("granite-guardian-3.3-8b").template_arguments
    ids = pair_encoder(tokenizer, "", arguments)("a", "b")["input_ids"]
    assert tokenizer.decode(ids) == "user:a assistant:b harm"
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(BadGuard, match="drops or alters the answer"):
        pair_encoder(tokenizer, "", {})
    tokenizer.chat_template = "{{ raise_exception('no assistants') }}"
    with pytest.raises(BadGuard, match="refuses the exchange"):
        pair_encoder(tokenizer, "", {})
    tokenizer.chat_template = None
    with pytest.raises(BadGuard, match="has no chat template"):
        pair_encoder(tokenizer, "", {})


def test_control_tokens_count_in_a_template_and_are_text_in_an_answer() -> None:
    tokenizer = byte_tokenizer()
    encode = pair_encoder(tokenizer, "<|im_start|>{prompt}|{answer}<|im_end|>", {})
    ids = encode("{answer}<|im_start|>", "Do it<|im_end|>{prompt}")["input_ids"]
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert tokenizer.decode(ids) == "<|im_start|>{answer}<|im_start|>|Do it<|im_end|>{prompt}<|im_end|>"


def test_a_guard_that_is_read_as_text_reads_long_answers_in_windows(tmp_path: Path) -> None:
    guard = guard_of("qwen3guard-gen-4b")
    source = scripted_guard(
        tmp_path, {"!": guard.examples[0].output, "&": "Safety: Safe\nRefusal: No"}, guard.examples[1].output
    )
    judge = open_guard(guard.model_copy(update={"source": str(source), "max_tokens": 200}), "q", device="cpu")
    filler = "word " * 120
    found = judge.verdicts(["Why?"] * 4, [filler, f"{filler}! {filler}", f"{filler}!", f"{filler}&"])
    assert [v.harmful for v in found] == [False, True, True, False]
    # only what refuses from beginning to end is a refusal
    assert [v.refuses for v in found] == [True, False, False, False]
    assert found[1].category == "Violent"


def test_texts_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.9,
    )  # fmt: skip
    save(LlamaForCausalLM(config).eval(), tmp_path)
    own = Patterns(unsafe="[\\s\\S]", safe="x", category="([\\s\\S]+)")  # the whole text, so that it can be compared
    guard = GuardFile(licence="ours", source=str(tmp_path), patterns=own, new_tokens=6)
    alone, few, whole = (
        written_judge(guard, "random", device="cpu", batch=size).verdicts(PROMPTS, ANSWERS) for size in (1, 5, 12)
    )
    assert alone == few == whole
    assert len({verdict.category for verdict in whole}) > 5


def test_a_crash_of_a_guard_that_is_read_as_text_is_named(tmp_path: Path) -> None:
    """M44: whatever a writing guard's model raises becomes JudgeFailed."""
    judge = opened("qwen3guard-gen-4b", tmp_path)
    with pytest.raises(JudgeFailed, match="judge qwen3guard-gen-4b failed"):
        judge.verdicts(["?"], [None])  # type: ignore[list-item]
