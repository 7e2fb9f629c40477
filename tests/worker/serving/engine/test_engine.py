"""The engine against plain transformers and peft: greedy answers, mixed batches, joining, leaving, cancelling."""

import queue
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from finetuning.model.base import FrozenBase, load_base
from finetuning.rows.chat_format import prompt_ids
from tests.support.tiny_llama import save_adapter, save_base
from tests.support.waiting import wait_until
from worker.serving.engine import (
    AdapterDoesNotFit,
    Ask,
    Broken,
    Ended,
    Engine,
    EngineEvent,
    EngineFull,
    EngineLimits,
    Piece,
    Sampling,
    ServedAdapter,
)
from worker.serving.engine.choices import OpenAsk
from worker.serving.engine.line import Line

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ServedAdapter | None]:
    top = tmp_path_factory.mktemp("adapters")
    wide = save_adapter(folder, top / "wide", seed=2, rank=8, layers=(0, 1, 2))
    narrow = save_adapter(folder, top / "narrow", seed=1)
    return {
        "public": None,
        "wide": ServedAdapter("served_wide", wide),
        "narrow": ServedAdapter("served_narrow", narrow),
    }


@pytest.fixture(scope="module")
def base(folder: Path) -> FrozenBase:
    return load_base(folder, device="cpu")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(rows=8, prefill_tokens=16))
    engine.start()
    yield engine
    engine.close()


class Inbox:
    """Collects the events of one ask."""

    def __init__(self) -> None:
        self.events: queue.Queue[EngineEvent] = queue.Queue()
        self.text: dict[int, str] = {}
        self.pieces: list[Piece] = []
        self.ended: dict[int, Ended] = {}

    def take(self) -> None:
        """Wait for one event and keep it."""
        event = self.events.get(timeout=60)
        assert not isinstance(event, Broken)
        if isinstance(event, Piece):
            self.pieces.append(event)
            self.text[event.choice] = self.text.get(event.choice, "") + event.text
        else:
            self.ended[event.choice] = event

    def wait(self, choices: int = 1) -> "Inbox":
        while len(self.ended) < choices:
            self.take()
        return self


def ask(
    prompt: list[int], inbox: Inbox, adapter: ServedAdapter | None = None, *, new_tokens: int = 24, **more: object
) -> Ask:
    fields: dict[str, object] = {"sampling": GREEDY, **more}
    return Ask(tuple(prompt), adapter, new_tokens=new_tokens, deliver=inbox.events.put, **fields)  # type: ignore[arg-type]


def generate(folder: Path, base: FrozenBase, prompt: list[int], adapter: ServedAdapter | None, new_tokens: int) -> str:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter.folder)
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    text: str = base.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
    return text


def prompts(base: FrozenBase, count: int) -> list[list[int]]:
    words = ["soup", "lamp", "quick fox?", "how do I mix the lazy dog", "été", "a" * 37]
    chosen = random.Random(3)
    return [prompt_ids(base.tokenizer, " ".join(chosen.choices(words, k=1 + i % 4))) for i in range(count)]


def test_mixed_adapters_in_one_batch_equal_plain_generate_of_each_row_alone(
    engine: Engine, folder: Path, base: FrozenBase, adapters: dict[str, ServedAdapter | None]
) -> None:
    names = ["public", "wide", "narrow", "wide", "public", "narrow", "narrow"]
    rows = list(zip(prompts(base, len(names)), names, range(8, 36, 4), strict=True))
    inboxes = [Inbox() for _ in rows]
    for (prompt, name, new_tokens), inbox in zip(rows, inboxes, strict=True):
        engine.submit(ask(prompt, inbox, adapters[name], new_tokens=new_tokens))
    for (prompt, name, new_tokens), inbox in zip(rows, inboxes, strict=True):
        inbox.wait()
        assert inbox.text.get(0, "") == generate(folder, base, prompt, adapters[name], new_tokens)
        assert inbox.ended[0].tokens <= new_tokens


def test_adapters_change_the_answer(
    engine: Engine, base: FrozenBase, adapters: dict[str, ServedAdapter | None]
) -> None:
    prompt = prompts(base, 1)[0]
    answers = set[str]()
    for adapter in adapters.values():
        inbox = Inbox()
        engine.submit(ask(prompt, inbox, adapter))
        answers.add(inbox.wait().text[0])
    assert len(answers) == 3


def test_a_row_that_joins_a_running_batch_gets_its_own_answer(
    engine: Engine, folder: Path, base: FrozenBase, adapters: dict[str, ServedAdapter | None]
) -> None:
    first, second = prompts(base, 2)
    running, late = Inbox(), Inbox()
    engine.submit(ask(first, running, adapters["wide"], new_tokens=80))
    running.take()  # it decodes now
    engine.submit(ask(second, late, adapters["narrow"]))
    assert late.wait().text[0] == generate(folder, base, second, adapters["narrow"], 24)
    assert running.wait().text[0] == generate(folder, base, first, adapters["wide"], 80)


def test_choices_share_a_prompt_and_differ_by_their_draws(engine: Engine, base: FrozenBase) -> None:
    prompt = prompts(base, 1)[0]
    inbox, again = Inbox(), Inbox()
    warm = Sampling(temperature=1.5)
    engine.submit(ask(prompt, inbox, sampling=warm, choices=3, seed=11))
    engine.submit(ask(prompt, again, sampling=warm, choices=3, seed=11))
    texts = inbox.wait(3).text
    assert len(set(texts.values())) == 3
    assert again.wait(3).text == texts


def test_pieces_join_to_the_same_text_with_and_without_a_far_stop(engine: Engine, base: FrozenBase) -> None:
    plain = Inbox()
    prompt = prompts(base, 3)[2]
    engine.submit(ask(prompt, plain))
    text = plain.wait().text[0]
    assert plain.ended[0].reason == "length"
    for start in range(len(text) - 3):
        stopped, stop = Inbox(), text[start : start + 3]
        engine.submit(ask(prompt, stopped, stops=(stop, "never there")))
        assert stopped.wait().text.get(0, "") == text[: text.index(stop)]
        assert stopped.ended[0].reason == "stop"


def test_a_cancelled_ask_leaves_room_for_others(engine: Engine, base: FrozenBase) -> None:
    prompt = prompts(base, 1)[0]
    for _ in range(30):
        inbox = Inbox()
        request = ask(prompt, inbox, new_tokens=100, choices=8)
        engine.submit(request)
        inbox.events.get(timeout=60)
        request.cancelled.set()
    inbox = Inbox()
    engine.submit(ask(prompt, inbox, new_tokens=3))
    inbox.wait()


def test_logprobs_belong_to_the_drawn_tokens(engine: Engine, base: FrozenBase) -> None:
    inbox = Inbox()
    engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=10, sampling=Sampling(temperature=0, top_logprobs=3)))
    entries = [entry for piece in inbox.wait().pieces for entry in piece.logprobs]
    assert len(entries) == inbox.ended[0].tokens
    for entry in entries:
        assert entry.top[0] == (entry.token, pytest.approx(entry.logprob))  # greedy: the likeliest was drawn
        assert len(entry.top) == 3
        assert entry.logprob < 0


def test_an_adapter_for_another_base_is_refused_and_harms_nobody(
    engine: Engine, base: FrozenBase, folder: Path, tmp_path: Path
) -> None:
    stranger = save_adapter(folder, tmp_path / "stranger", seed=5)
    config = stranger / "adapter_config.json"
    config.write_text(config.read_text().replace('"down_proj"', '"up_proj"'))
    with pytest.raises(AdapterDoesNotFit):
        engine.attach(ServedAdapter("served_stranger", stranger)).result(timeout=60)
    inbox = Inbox()
    engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=4))
    inbox.wait()
    assert "served_stranger" not in engine.attached


def test_a_refused_adapter_that_came_first_leaves_the_base_as_it_was(
    folder: Path, base: FrozenBase, tmp_path: Path
) -> None:
    engine = Engine(load_base(folder, device="cpu"), EngineLimits())
    stranger = save_adapter(folder, tmp_path / "stranger", seed=5)
    config = stranger / "adapter_config.json"
    config.write_text(config.read_text().replace('"down_proj"', '"up_proj"'))
    fits = ServedAdapter("served_fits", save_adapter(folder, tmp_path / "fits", seed=1))
    engine.start()
    try:
        with pytest.raises(AdapterDoesNotFit):
            engine.attach(ServedAdapter("served_stranger", stranger)).result(timeout=60)
        for adapter in (None, fits, None):
            inbox = Inbox()
            engine.submit(ask(prompts(base, 1)[0], inbox, adapter))
            assert inbox.wait().text[0] == generate(folder, base, prompts(base, 1)[0], adapter, 24)
    finally:
        engine.close()


def test_an_adapter_with_broken_weights_ends_its_own_answers_alone(
    engine: Engine, folder: Path, base: FrozenBase, adapters: dict[str, ServedAdapter | None], tmp_path: Path
) -> None:
    broken = save_adapter(folder, tmp_path / "broken", seed=5)
    weights = broken / "adapter_model.safetensors"
    save_file({name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}, weights)
    engine.attach(ServedAdapter("served_broken", broken)).result(timeout=60)
    first, second = prompts(base, 2)
    running, failing = Inbox(), Inbox()
    engine.submit(ask(first, running, adapters["wide"], new_tokens=80))
    running.take()  # it decodes now
    engine.submit(ask(second, failing, ServedAdapter("served_broken", broken), choices=2))
    assert failing.events.get(timeout=60) == Broken()
    assert running.wait().text[0] == generate(folder, base, first, adapters["wide"], 80)
    assert failing.events.empty()  # one ask, one end
    wait_until(lambda: engine.open_asks == 0, seconds=10)


def test_the_smallest_temperature_ends_nobody(engine: Engine, folder: Path, base: FrozenBase) -> None:
    prompt = prompts(base, 1)[0]
    inbox = Inbox()
    engine.submit(ask(prompt, inbox, sampling=Sampling(temperature=5e-324)))
    assert inbox.wait().text[0] == generate(folder, base, prompt, None, 24)


def test_the_least_used_adapter_leaves_and_comes_back(folder: Path, base: FrozenBase, tmp_path: Path) -> None:
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(adapters=2))
    engine.start()
    made = [ServedAdapter(f"served_{i}", save_adapter(folder, tmp_path / str(i), seed=i)) for i in range(3)]
    prompt = prompts(base, 1)[0]
    try:
        for adapter in [*made, made[0]]:
            inbox = Inbox()
            engine.submit(ask(prompt, inbox, adapter))
            assert inbox.wait().text[0] == generate(folder, base, prompt, adapter, 24)
        assert set(engine.attached) == {"served_0", "served_2"}
    finally:
        engine.close()


def test_tenants_take_turns(folder: Path, base: FrozenBase) -> None:
    """S15: one tenant's line was served to its end before another's first ask."""
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(rows=1, waiting=20))
    order: queue.Queue[str] = queue.Queue()
    for tenant in ("many", "many", "many", "few"):
        done = Ended, tenant
        engine.submit(
            Ask(
                tuple(prompts(base, 1)[0]), None, GREEDY, 3, tenant=tenant,
                deliver=lambda event, done=done: order.put(done[1]) if isinstance(event, done[0]) else None,
            )
        )  # fmt: skip
    engine.start()
    assert [order.get(timeout=60) for _ in range(4)] == ["many", "few", "many", "many"]
    engine.close()


def test_one_tenant_cannot_fill_the_line(folder: Path, base: FrozenBase) -> None:
    """S15: 80 streams of one made every other one `overloaded`."""
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(rows=4, waiting=4))
    inbox, taken = Inbox(), 0
    with pytest.raises(EngineFull):
        for _ in range(8):
            engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=2, tenant="many"))
            taken += 1
    assert taken == 4
    engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=2, tenant="few"))
    engine.start()
    for _ in range(5):
        inbox.wait()
        inbox.ended.clear()
    wait_until(lambda: engine.open_asks == 0, seconds=10)
    assert engine.has_room("many")
    engine.close()


def test_a_small_ask_passes_a_large_one_that_does_not_fit_yet(folder: Path, base: FrozenBase) -> None:
    """S15: only the first in line was considered, so a large one held up all behind it."""
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(rows=4, cached_tokens=1200))
    running, large, small = Inbox(), Inbox(), Inbox()
    prompt = prompts(base, 1)[0]
    engine.submit(ask(prompt, running, new_tokens=400, tenant="a"))
    engine.submit(ask(prompt, large, new_tokens=1000, tenant="b"))
    engine.submit(ask(prompt, small, new_tokens=2, tenant="c"))
    engine.start()
    small.wait()
    assert not running.ended
    assert not large.ended
    assert large.events.empty()
    running.wait()
    large.wait()
    engine.close()


def test_a_large_ask_is_not_passed_for_ever() -> None:
    """S15: after a while the room is kept for it."""
    line, large = Line(), _waiting(10, "a")
    line.add(large)
    taken = []
    for _ in range(40):
        line.add(_waiting(1, "b"))
        taken.append(line.take(lambda ask: ask.new_tokens < 10))
    assert sum(one is not None for one in taken) == 16
    assert taken[-1] is None
    assert line.take(lambda _: True) is large


def _waiting(new_tokens: int, tenant: str) -> OpenAsk:
    return OpenAsk(Ask((1,), None, GREEDY, new_tokens, lambda _: None, tenant=tenant))


def test_a_full_line_says_so(folder: Path, base: FrozenBase) -> None:
    engine = Engine(load_base(folder, device="cpu"), EngineLimits(rows=1, waiting=1))
    inbox = Inbox()
    for tenant in range(2):
        engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=2, tenant=str(tenant)))
    with pytest.raises(EngineFull):
        engine.submit(ask(prompts(base, 1)[0], inbox, new_tokens=2, tenant="2"))
    engine.start()
    inbox.wait()
    engine.close()
