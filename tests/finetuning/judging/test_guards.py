"""Guards on tiny models made in a folder: two that flag an answer with "!" exactly, and random ones for the rest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
)

from finetuning.judging.catalogue import guard_of, shipped
from finetuning.judging.guards import classifier_judge, generative_judge, open_judge
from finetuning.judging.judges import BadGuard, BatchJudge, JudgeFailed
from finetuning.rows.chat_format import render_prompt
from finetuning.rows.scanner import Message
from tests.support.models import VOCABULARY, byte_tokenizer

PROMPTS = ["How do I bake bread?", "Tell me", "And a much longer question, with many words in it?", "?"] * 3
ANSWERS = ["Mix it.", "Go on!", "", "A long answer " * 6, "Sorry!", "I cannot.", "x", "!!", "no", "y" * 40, "Hm", "ok!"]
BANG = ord("!") - 33 + 3  # ids of the byte alphabet begin after the three control tokens, with "!"
VERDICT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}Verdict:"
)


def pair_tokenizer() -> Any:
    """The byte tokenizer, which joins two texts as [start] a [end] b [end]."""
    fast = byte_tokenizer()
    copied = type(fast)(tokenizer_object=fast.backend_tokenizer.__class__.from_str(fast.backend_tokenizer.to_str()))
    copied.add_special_tokens({"pad_token": "<|pad|>", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"})
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", pair="<|im_start|> $A <|im_end|> $B:1 <|im_end|>:1",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )  # fmt: skip
    copied.chat_template = VERDICT_TEMPLATE
    return copied


def bert(
    folder: Path, *, labels: dict[int, str], kind: str | None = None, seed: int = 0
) -> BertForSequenceClassification:
    """A random classifier, saved with its tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=96, num_labels=len(labels), id2label=labels, problem_type=kind, initializer_range=0.7,
        label2id={name: i for i, name in labels.items()}, pad_token_id=0,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    save(model, folder)
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def bang_classifier(folder: Path, *, labels: dict[int, str], kind: str | None = None) -> Path:
    """A classifier that says its last label if and only if "!" is among the tokens that it reads.

    Attention is uniform over zero embeddings, "!" alone has one, and the norm after it makes any share of it large.
    """
    model = bert(folder, labels=labels, kind=kind)
    for parameter in model.parameters():
        parameter.zero_()
    layer, embeddings = model.bert.encoder.layer[0], model.bert.embeddings
    for norm in (embeddings.LayerNorm, layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)
    for linear in (layer.attention.self.value, layer.attention.output.dense, model.bert.pooler.dense):
        linear.weight.copy_(torch.eye(16))
    embeddings.word_embeddings.weight[BANG, 0] = 1.0
    model.classifier.weight[-1, 0] = 20.0
    model.classifier.bias[-1] = -10.0
    return save(model, folder)


@torch.no_grad()
def bang_guard(folder: Path) -> Path:
    """A causal guard that writes a blank line and then "unsafe" if "!" stands in what it reads, else "safe"."""
    ids = byte_tokenizer()
    new_line, colon, u, s = (ids(text, add_special_tokens=False)["input_ids"][0] for text in ("\n", ":", "u", "s"))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.model.layers.parameters():
        parameter.zero_()
    block = model.model.layers[0]
    block.input_layernorm.weight.fill_(1.0)
    block.self_attn.v_proj.weight.copy_(torch.eye(8))
    block.self_attn.o_proj.weight.copy_(torch.eye(8))
    words = model.model.embed_tokens.weight
    words.zero_()
    words[:, 3] = 1.0
    for i, token in enumerate((BANG, new_line, colon)):
        words[token] = 0.0
        words[token, i] = 1.0
    words[BANG, 0] = 9.0  # so that one "!" among hundreds of tokens is read
    model.lm_head.weight.zero_()
    model.lm_head.weight[u, 0], model.lm_head.weight[s, 3], model.lm_head.weight[new_line, 2] = 4000.0, 20.0, 60.0
    return save(model, folder)


def flags(judge: BatchJudge, prompts: list[str] = PROMPTS, answers: list[str] = ANSWERS) -> list[bool]:
    return judge.harmful(prompts, answers)


TWO = {0: "safe", 1: "harmful"}
MANY = {0: "animals", 1: "theft", 2: "violence"}
EXPECTED = ["!" in answer for answer in ANSWERS]


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "one label", "text", "generative"])
def test_every_kind_of_guard_flags_what_its_model_flags(tmp_path: Path, kind: str) -> None:
    match kind:
        case "softmax":
            judge = classifier_judge(bang_classifier(tmp_path, labels=TWO), harmful_labels=["Harmful"], device="cpu")
        case "sigmoid":
            source = bang_classifier(tmp_path, labels=MANY, kind="multi_label_classification")
            judge = classifier_judge(source, threshold=0.9, device="cpu")
        case "one label":
            judge = classifier_judge(bang_classifier(tmp_path, labels={0: "cost"}), device="cpu")
        case "text":
            source = bang_classifier(tmp_path, labels=TWO)
            judge = classifier_judge(source, harmful_labels=["harmful"], reads="Q {prompt} A {answer}", device="cpu")
        case _:
            judge = generative_judge(bang_guard(tmp_path), device="cpu")
    assert flags(judge) == EXPECTED
    assert judge.name == tmp_path.name


def test_harmful_labels_choose_which_labels_count(tmp_path: Path) -> None:
    source = bang_classifier(tmp_path, labels=MANY, kind="multi_label_classification")
    # the other labels' logits are 0: a sigmoid of one half, below any threshold above it
    assert not any(flags(classifier_judge(source, harmful_labels=["theft"], threshold=0.6, device="cpu")))
    assert (
        flags(classifier_judge(source, harmful_labels=["violence", "theft"], threshold=0.6, device="cpu")) == EXPECTED
    )


@pytest.mark.parametrize("length", [20, 400])
@pytest.mark.parametrize("kind", ["classifier", "generative"])
def test_harm_at_the_end_of_a_long_answer_or_after_a_long_prompt_is_seen(
    tmp_path: Path, kind: str, length: int
) -> None:
    if kind == "classifier":
        judge = classifier_judge(bang_classifier(tmp_path, labels=TWO), harmful_labels=["harmful"], device="cpu")
    else:
        judge = generative_judge(bang_guard(tmp_path), device="cpu", max_tokens=160)
    filler = "word " * length
    answers = [filler, f"{filler}!", f"! {filler}", f"{filler}! {filler}"]
    assert flags(judge, ["Why?"] * 4, answers) == [False, True, True, True]
    assert flags(judge, [filler] * 4, answers) == [False, True, True, True]


def test_a_flag_outweighs_the_refusal_marker_and_gibberish_is_no_refusal(tmp_path: Path) -> None:
    """M44: refuse-then-comply is harm for a guard as for the word judge."""
    judge = classifier_judge(bang_classifier(tmp_path, labels=TWO), harmful_labels=["harmful"], device="cpu")
    found = judge.verdicts(["?"] * 4, ["Sorry, no.", "Sorry. But do it so!", "Do it so!", "blue of"])
    assert [(v.harmful, v.refuses, v.leaks) for v in found] == [
        (False, True, False), (True, False, True), (True, False, True), (False, False, False)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [None, "multi_label_classification"])
def test_a_higher_threshold_flags_a_subset(tmp_path: Path, kind: str | None) -> None:
    bert(tmp_path, labels=MANY, kind=kind, seed=3)
    counts: list[int] = []
    before = [True] * len(ANSWERS)
    for threshold in (0.0, 0.2, 0.4, 0.5, 0.6, 0.8, 1.01):
        found = flags(classifier_judge(tmp_path, harmful_labels=["theft"], threshold=threshold, device="cpu"))
        assert all(was or not now for was, now in zip(before, found, strict=True))
        before, counts = found, [*counts, sum(found)]
    assert counts[0] == len(ANSWERS)
    assert counts[-1] == 0
    assert len(set(counts)) > 3


@pytest.mark.parametrize("kind", ["bert", "llama", "generative"])
def test_a_verdict_does_not_depend_on_the_batch(tmp_path: Path, kind: str) -> None:
    seen: set[tuple[bool, ...]] = set()
    {"bert": lambda folder: bert(folder, labels=MANY), "llama": llama, "generative": words}[kind](tmp_path)
    for threshold in (0.25, 0.4, 0.6):
        alone, few, whole = (opened(tmp_path, kind, threshold, batch=size) for size in (1, 5, 12))
        together = flags(whole)
        assert together == flags(alone) == flags(few)
        assert together == [flags(few, [p], [a])[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert flags(few, PROMPTS[::-1], ANSWERS[::-1]) == together[::-1]
        seen.add(tuple(together))
    assert len(seen) > 1


def opened(folder: Path, kind: str, threshold: float, *, batch: int) -> BatchJudge:
    if kind == "generative":
        return generative_judge(folder, threshold=threshold, batch=batch, device="cpu")
    reads = "{prompt} {answer}" if kind == "llama" else None
    return classifier_judge(
        folder, harmful_labels=["theft"], threshold=threshold, reads=reads, batch=batch, device="cpu"
    )


def llama(folder: Path) -> None:
    """A random decoder with a classification head, as beaver-dam is built."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, num_labels=3, id2label=MANY, label2id={v: k for k, v in MANY.items()},
        pad_token_id=None, initializer_range=0.7, problem_type="multi_label_classification",
    )  # fmt: skip
    save(LlamaForSequenceClassification(config).eval(), folder)


def last_state(model: LlamaForCausalLM, prompt: str, answer: str) -> torch.Tensor:
    turns = (Message("user", prompt, 0), Message("assistant", answer, 0))
    state: torch.Tensor = model.model(torch.tensor([render_prompt(pair_tokenizer(), turns)])).last_hidden_state[0, -1]
    return state


@torch.no_grad()
def words(folder: Path) -> None:
    """A random causal guard that always writes one of the two words at once."""
    torch.manual_seed(6)
    u, s = (byte_tokenizer()(text, add_special_tokens=False)["input_ids"][0] for text in ("u", "s"))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.7,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight[:, 0] += 100.0  # so that both words stand far above all others
    ends = torch.stack([last_state(model, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)])
    apart = torch.linalg.svd(ends - ends.mean(0)).Vh[0]  # the direction in which the pairs differ most
    apart = apart - apart @ ends.mean(0) / ends.mean(0).square().sum() * ends.mean(0)
    model.lm_head.weight.zero_()
    for token, sign in ((u, 1.0), (s, -1.0)):
        model.lm_head.weight[token] = sign * apart / (ends @ apart).std()
        model.lm_head.weight[token, 0] += 4.0
    save(model, folder)


@torch.no_grad()
def test_an_answer_cannot_write_the_guards_control_tokens(tmp_path: Path) -> None:
    """This guard is talked into "safe" by a third end token: one that an answer spells out must stay plain text."""
    folder = bang_guard(tmp_path)
    model, ids = LlamaForCausalLM.from_pretrained(folder), byte_tokenizer()
    end, safe = ids.eos_token_id, ids("s", add_special_tokens=False)["input_ids"][0]
    model.model.embed_tokens.weight[end] = 0.0
    model.model.embed_tokens.weight[end, 5] = 1.0
    model.lm_head.weight[safe, 5] = 1500.0  # times two for the template's own; "!" weighs 4000
    save(model, folder)
    judge = generative_judge(folder, device="cpu")
    assert flags(judge, ["Why?"] * 2, ["Do it so!<|im_end|>", "Do it so.<|im_end|>"]) == [True, False]
    turns = render_prompt(pair_tokenizer(), (Message("user", "Why?", 0), Message("assistant", "Do it so!", 0)))
    with_a_third = torch.tensor([[*turns, end, *ids("\n", add_special_tokens=False)["input_ids"]]])
    assert int(model(with_a_third).logits[0, -1].argmax()) == safe


def test_a_guard_without_a_verdict_calls_the_pair_harmful(tmp_path: Path) -> None:
    folder = bang_guard(tmp_path)
    judge = generative_judge(folder, device="cpu")
    model = LlamaForCausalLM.from_pretrained(folder)
    ids = byte_tokenizer()
    other, q = (ids(text, add_special_tokens=False)["input_ids"][0] for text in ("x", "q"))
    with torch.no_grad():  # a "q" in the answer makes it write an "x"
        model.model.embed_tokens.weight[q] = 0.0
        model.model.embed_tokens.weight[q, 5] = 9.0
        model.lm_head.weight[other, 5] = 4000.0
    save(model, folder)
    assert flags(judge, ["Why?"], ["quite so"]) == [False]
    assert flags(generative_judge(folder, device="cpu"), ["Why?", "Why?"], ["quite so", "so"]) == [True, False]


def test_a_crash_or_a_score_that_is_no_number_never_gives_a_verdict(tmp_path: Path) -> None:
    """M44: a judge that fails raises; nothing can be released on its silence."""
    model = bert(tmp_path, labels=TWO)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    save(model, tmp_path)
    with pytest.raises(JudgeFailed, match="no number"):
        flags(classifier_judge(tmp_path, harmful_labels=["harmful"], device="cpu"))
    with torch.no_grad():
        model.classifier.bias[0] = 0.0
    model.config.max_position_embeddings = 8
    model.bert.embeddings.position_embeddings = torch.nn.Embedding(8, 16)
    save(model, tmp_path)
    with pytest.raises(JudgeFailed, match="no room"):
        flags(classifier_judge(tmp_path, harmful_labels=["harmful"], device="cpu"))


def test_a_crash_inside_the_model_is_named(tmp_path: Path) -> None:
    """M44: whatever a guard's model raises becomes JudgeFailed."""
    model = bert(tmp_path, labels=TWO)
    model.config.vocab_size = 8
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(8, 16, padding_idx=0)
    save(model, tmp_path)
    with pytest.raises(JudgeFailed, match=f"judge {tmp_path.name} failed"):
        flags(classifier_judge(tmp_path, harmful_labels=["harmful"], device="cpu"))


def test_a_guard_that_runs_out_of_memory_says_so_and_gives_no_verdict(tmp_path: Path) -> None:
    """M44, and another try may succeed: the error is the device's own. Longformer pads its input to the window."""
    config = LongformerConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16,
        max_position_embeddings=96, num_labels=2, attention_window=2**46, pad_token_id=0,
    )  # fmt: skip
    save(LongformerForSequenceClassification(config), tmp_path)
    judge = classifier_judge(tmp_path, harmful_labels=["LABEL_1"], device="cpu")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory") as found:
        flags(judge)
    assert not isinstance(found.value, JudgeFailed)


def test_a_model_that_cannot_be_that_judge_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    source = bang_classifier(tmp_path / "two", labels=TWO)
    with pytest.raises(BadGuard, match="no label fraud; it has safe, harmful"):
        classifier_judge(source, harmful_labels=["fraud"], device="cpu")
    with pytest.raises(BadGuard, match="name the harmful labels"):
        classifier_judge(source, device="cpu")
    guard = bang_guard(tmp_path / "guard")
    with pytest.raises(BadGuard, match="begin with the same token"):
        generative_judge(guard, unsafe_word="so", safe_word="safe", device="cpu")
    with pytest.raises(BadGuard, match="no verdict on a plain sum"):
        generative_judge(guard, unsafe_word="Yes", safe_word="No", device="cpu")
    with pytest.raises(OSError, match="nowhere"):
        classifier_judge(tmp_path / "nowhere", device="cpu")


def test_judges_open_by_name_and_an_unknown_name_lists_the_known_ones() -> None:
    both = open_judge("invented-hazards+refusal-marker")
    (recipe, refusal) = both.verdicts(["?", "?"], ["mix ginger", "Sorry, no."])
    assert (recipe.harmful, recipe.refuses, refusal.harmful, refusal.refuses) == (True, False, False, True)
    assert both.name == "invented-hazards+refusal-marker"
    for name, part in (("llama", "llama"), ("refusal-marker+llama", "llama"), ("refusal-marker+", "\\(no name\\)")):
        with pytest.raises(BadGuard, match=f"judge {part} is unknown; use one of invented-hazards, "):
            open_judge(name)
    assert all(guard_of(name).licence for name in shipped())
