"""Chat through the API, with the unmodified SDK, a real model server and a tiny random base."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from app.api.http.server import make_server
from app.core import models, projects
from app.core.jobs import ended, lease
from app.core.settings import Settings
from app.core.storage.blobs import open_blobs, put_bytes
from app.core.storage.database import migrate, open_database
from app.core.storage.tables import BaseRow, BaseStatus, Form
from app.main import build_app
from finetuning.model.base import load_base
from finetuning.rows.chat_format import prompt_ids
from tests.support.backends import BACKEND
from tests.support.http import WORKER, Customer, Served
from tests.support.jobs import QUICK
from tests.support.model_server import SECRET, ModelServer, model_server
from tests.support.tiny_llama import CONTEXT, save_adapter, save_base, zip_adapter
from tests.support.waiting import wait_until
from tests.worker.serving.engine.test_engine import generate
from worker.processes import StartedProgram
from worker.serving.engine import ServedAdapter

PROMPT = "how do I mix a soup?"
HI = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("chat-api")
    (data / "blobs").mkdir()
    return data


@pytest.fixture(scope="module")
def zips(folder: Path, data: Path) -> dict[str, bytes]:
    """Artifact zips of two random adapters; their folders lie beside each other below `data`."""
    return {
        name: zip_adapter(save_adapter(folder, data / name, seed=seed), data / f"{name}.zip")
        for seed, name in enumerate(("alignment", "adapter_stock"), start=1)
    }


@pytest.fixture(scope="module")
def server(folder: Path, data: Path) -> Iterator[ModelServer]:
    with model_server(folder, data) as running:
        yield running


@pytest.fixture(scope="module")
def served(
    data: Path, server: ModelServer, zips: dict[str, bytes], broker_folder: Path, broker_process: StartedProgram
) -> Iterator[Served]:
    """The API over real HTTP in front of the model server; its base is aligned by a random adapter."""
    assert broker_process.is_alive
    values = {
        "base": "tiny",
        "model_server_urls": (server.url,),
        "model_server_secret": SECRET,
        "lease": QUICK.model_copy(update={"ttl_seconds": 600.0, "reaper_tick_seconds": 600.0}),
    }
    settings = Settings.model_validate(
        {"data": data, **BACKEND.storage(data), **BACKEND.broker(broker_folder), **values}
    )
    migrate(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    api = make_server(build_app(settings), settings)
    thread = threading.Thread(target=api.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    httpx2.get(f"{url}/readyz", timeout=30.0).raise_for_status()
    database = open_database(settings)
    opened = Served(url, settings, database, open_blobs(settings), projects.load_pepper(settings))
    with database.writing() as session:
        job = models.get_alignment(session, "tiny")
        assert job is not None
        held = lease.claim(session, settings, job.id, WORKER)
        assert held is not None
        ended.finish(session, held, published(opened, held, {Form.ALIGNMENT: zips["alignment"]}))
        session.commit()
    yield opened
    api.should_exit = True
    thread.join(timeout=30.0)
    database.close()


def published(served: Served, held: lease.Lease, contents: dict[Form, bytes]) -> ended.Published:
    prefix = f"{held.prefix}/result"
    files = [
        ended.PublishedFile(form, f"{form}.zip", put_bytes(served.blobs, f"{prefix}/{form}.zip", content))
        for form, content in contents.items()
    ]
    return ended.Published(prefix, tuple(files), {}, 0)


@pytest.fixture
def tuned(customer: Customer, zips: dict[str, bytes]) -> str:
    """The name of a model of this customer."""
    held = customer.claim(customer.job())
    contents = {Form.METRICS: b"", Form.REPORTS: b"", Form.ADAPTER: b"", Form.ADAPTER_STOCK: zips["adapter_stock"]}
    with customer.served.database.writing() as session:
        ended.finish(session, held, published(customer.served, held, contents))
        session.commit()
    name = customer.sdk.fine_tuning.jobs.retrieve(held.job_id).fine_tuned_model
    assert name is not None
    return name


def ask(customer: Customer, **fields: object) -> httpx2.Response:
    return customer.http.post("/chat/completions", json={"model": "tiny", "messages": HI, "max_tokens": 4, **fields})


def greedy(customer: Customer, model: str) -> str:
    answer = customer.sdk.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_tokens=24,
    )
    assert (answer.model, answer.object) == (model, "chat.completion")
    return answer.choices[0].message.content or ""


def test_base_and_model_answer_as_the_downloaded_adapters_do(
    customer: Customer, tuned: str, folder: Path, data: Path
) -> None:
    base = load_base(folder, device="cpu")
    prompt = prompt_ids(base.tokenizer, PROMPT)
    expected = {
        name: generate(folder, base, prompt, ServedAdapter(name, data / name), 24)
        for name in ("alignment", "adapter_stock")
    }
    assert greedy(customer, "tiny") == expected["alignment"]
    assert greedy(customer, tuned) == expected["adapter_stock"]
    assert expected["alignment"] != expected["adapter_stock"]


def test_a_stream_says_what_the_whole_answer_says(customer: Customer, tuned: str) -> None:
    whole = greedy(customer, tuned)
    pairs = [whole[at : at + 2] for at in range(len(whole) // 2, len(whole) - 1)]
    stop = next(pair for pair in pairs if pair.isascii() and pair.isprintable())
    with customer.sdk.chat.completions.stream(
        model=tuned,
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0,
        max_completion_tokens=24,
        stop=stop,  # the SDK's helper takes an answer that ran out of tokens for an error
        stream_options={"include_usage": True},
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == whole[: whole.index(stop)]
    assert final.choices[0].finish_reason == "stop"
    assert final.model == tuned
    assert final.usage is not None
    assert final.usage.total_tokens == final.usage.prompt_tokens + final.usage.completion_tokens


def test_a_stream_has_data_lines_and_comments_only(customer: Customer) -> None:
    reply = ask(customer, stream=True, stream_options={"include_usage": True}, n=2)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-accel-buffering"] == "no"
    *events, last = reply.content.decode("ascii").removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert [chunk["choices"][0]["delta"].get("role") for chunk in chunks[:2]] == ["assistant"] * 2
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert {(chunk["id"], chunk["model"]) for chunk in chunks} == {(chunks[0]["id"], "tiny")}


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_counted_and_what_was_not_used_is_given_back(customer: Customer, *, stream: bool) -> None:
    """S11: a reply says what is left of the project's tokens a minute."""
    left: list[int] = []
    for _ in range(3):
        reply = ask(customer, n=8, max_tokens=5000, stream=stream, stop=["e", "a", " ", "o"])
        assert reply.status_code == 200
        assert reply.headers["x-ratelimit-limit-tokens"] == "200000"
        left.append(int(reply.headers["x-ratelimit-remaining-tokens"]))
    assert left[0] <= 196_000  # held while it lasts: eight times what the base can answer
    assert left[2] > 190_000  # most of it given back since


def test_many_streams_at_once_all_end_well(customer: Customer, tuned: str) -> None:
    async def one(client: openai.AsyncOpenAI, model: str) -> str:
        stream = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": PROMPT}], temperature=0, max_tokens=24, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{customer.served.url}/v1", api_key=customer.key) as client:
            return await asyncio.gather(*(one(client, model) for model in [tuned, "tiny"] * 10))

    assert asyncio.run(all_of_them()) == [greedy(customer, tuned), greedy(customer, "tiny")] * 10


@pytest.mark.parametrize(
    "name", ["gpt-4o", "../../base", "/etc/passwd", "file:///x", "ft:tiny:a:b:c", "x" * 5000, "a\nb"]
)
def test_unknown_names_are_not_found(customer: Customer, name: str) -> None:
    reply = ask(customer, model=name)
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


def test_a_model_is_its_own_projects_only_and_ends_with_its_deletion(
    customer: Customer, tuned: str, served: Served
) -> None:
    secret = projects.new_secret()
    with served.database.writing() as session:
        stranger = projects.ensure_project(session, "stranger", policy="immunotune")
        projects.add_key(session, served.pepper, stranger, secret)
        session.commit()
    body = {"model": tuned, "messages": HI}
    foreign = httpx2.post(
        f"{served.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}, timeout=30
    )
    assert foreign.status_code == 404
    customer.sdk.models.delete(tuned)
    assert ask(customer, model=tuned).json() == foreign.json()


def test_a_job_that_failed_its_gate_answers_nothing(customer: Customer) -> None:
    job = customer.job()
    customer.fail_gate(job)
    assert ask(customer, model=f"ft:tiny:x::{job.id[-8:]}").status_code == 404


def test_a_base_that_is_being_aligned_asks_to_come_back(customer: Customer, served: Served) -> None:
    with served.database.writing() as session:
        session.merge(BaseRow(id="newbase", source="newbase", context=64, status=BaseStatus.ALIGNING))
        session.commit()
    reply = ask(customer, model="newbase")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_loading")
    assert 2 <= int(reply.headers["retry-after"]) <= 30


def part(**fields: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": [fields]}]


FAULTS: list[tuple[dict[str, object], str, str | None]] = [
    ({"messages": []}, "invalid_message", "messages"),
    ({"messages": "hi"}, "invalid_message", "messages"),
    ({"messages": HI * 5000}, "invalid_message", "messages"),
    ({"messages": ["hi"]}, "invalid_message", "messages"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "invalid_message", "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "invalid_message", "messages[0].role"),
    ({"messages": [*HI, {"role": 7, "content": "x"}]}, "invalid_message", "messages[1].role"),
    ({"messages": [{"role": "function", "content": "x"}]}, "invalid_message", "messages[0].role"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "tools_not_supported", "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "invalid_message", "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "invalid_message", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "unknown_parameter", "messages[0].weight"),
    ({"messages": part(type="image_url", image_url={})}, "unsupported_content_part", "messages[0].content"),
    ({"messages": part(type="input_audio")}, "unsupported_content_part", "messages[0].content"),
    ({"messages": part(type="text", text=3)}, "invalid_message", "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a b" * CONTEXT}]}, "context_length_exceeded", "messages"),
    ({"n": 10**6}, "invalid_value", "n"),
    ({"n": 0}, "invalid_value", "n"),
    ({"max_tokens": -1}, "invalid_value", "max_tokens"),
    ({"max_completion_tokens": 3}, "invalid_value", None),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": True}, "invalid_type", "temperature"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"top_p": 0}, "invalid_value", "top_p"),
    ({"logprobs": True, "top_logprobs": 50}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 2}, "invalid_value", None),
    ({"stop": ["x"] * 1000}, "invalid_value", "stop"),
    ({"stop": [""]}, "invalid_value", "stop[0]"),
    ({"stop": ["x", 5]}, "invalid_type", "stop[1]"),
    ({"stop": "x" * 257}, "invalid_value", "stop[0]"),
    ({"seed": 2**63}, "invalid_value", "seed"),
    ({"seed": 1.5}, "invalid_type", "seed"),
    ({"presence_penalty": -3}, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": 3}, "invalid_value", "frequency_penalty"),
    ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
    ({"logit_bias": {"soup": 1}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(301)}}, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 5}}, "invalid_value", "logit_bias.1"),  # a control token of this base
    ({"logit_bias": {"99999": 5}}, "invalid_value", "logit_bias.99999"),
    ({"stream_options": {"include_usage": True}}, "invalid_value", None),
    ({"tools": [{"type": "function"}]}, "tools_not_supported", "tools"),
    ({"tool_choice": "auto"}, "tools_not_supported", "tool_choice"),
    ({"parallel_tool_calls": True}, "tools_not_supported", "parallel_tool_calls"),
    ({"response_format": {"type": "json_object"}}, "response_format_not_supported", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format_not_supported", "response_format"),
    ({"store": True}, "unsupported_parameter", "store"),
    ({"audio": {}}, "unsupported_parameter", "audio"),
    ({"modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ({"functions": []}, "unsupported_parameter", "functions"),
    ({"function_call": "none"}, "unsupported_parameter", "function_call"),
    ({"web_search_options": {}}, "unsupported_parameter", "web_search_options"),
    ({"moderation": {}}, "unsupported_parameter", "moderation"),
    ({"prediction": {}}, "unsupported_parameter", "prediction"),
    ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort"),
    ({"verbosity": "low"}, "unsupported_parameter", "verbosity"),
    ({"chat_template": "x"}, "unknown_parameter", "chat_template"),
    ({"chat_template_kwargs": {}}, "unknown_parameter", "chat_template_kwargs"),
    ({"adapter_path": "x"}, "unknown_parameter", "adapter_path"),
    ({"guided_json": {}}, "unknown_parameter", "guided_json"),
]


def test_field_rules(customer: Customer) -> None:
    for fields, code, param in FAULTS:
        reply = ask(customer, **fields)
        error = reply.json()["error"]
        found = (reply.status_code, error["code"], error["param"], error["type"])
        assert found == (400, code, param, "invalid_request_error"), fields


def test_a_stream_is_refused_before_its_first_byte(customer: Customer) -> None:
    for fields in ({"n": 0}, {"logit_bias": {"1": 5}}, {"messages": [{"role": "user", "content": "a b" * CONTEXT}]}):
        reply = ask(customer, stream=True, **fields)
        assert (reply.status_code, reply.headers["content-type"]) == (400, "application/json")


def test_a_missing_field_is_named(customer: Customer) -> None:
    for name in ("model", "messages"):
        body = {key: value for key, value in {"model": "tiny", "messages": HI}.items() if key != name}
        error = customer.http.post("/chat/completions", json=body).json()["error"]
        assert (error["code"], error["param"]) == ("missing_required_parameter", name)


def test_fields_without_effect_and_nulls_are_accepted(customer: Customer) -> None:
    reply = ask(
        customer,
        user="u",
        safety_identifier="s",
        metadata={"a": "b"},
        prompt_cache_key="k",
        prompt_cache_options={"ttl": "30m"},
        prompt_cache_retention="24h",
        service_tier="auto",
        store=False,
        modalities=["text"],
        response_format={"type": "text"},
        tools=None,
        functions=None,
        seed=None,
        stop=None,
        stream=True,
        stream_options={"include_obfuscation": False},
    )
    assert reply.status_code == 200


def test_parts_roles_and_answers_of_the_sdk_come_through(customer: Customer) -> None:
    answer = customer.sdk.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "soup"}], max_tokens=4, seed=3
    )
    again = customer.sdk.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
            {"role": "user", "content": "soup", "name": "ann"},
            answer.choices[0].message,  # type: ignore[list-item]  # what people do
            {"role": "user", "content": ""},
        ],
        max_tokens=4,
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens > 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_answer(customer: Customer, server: ModelServer, stream: bool) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": CONTEXT, "n": 8, "temperature": 0, "stream": stream}

    def leave() -> None:
        with (
            httpx2.Client(headers={"Authorization": f"Bearer {customer.key}"}, timeout=1.5) as client,
            client.stream("POST", f"{customer.served.url}/v1/chat/completions", json=body) as reply,
        ):
            for _ in reply.iter_raw():
                if server.open_asks():
                    break

    try:
        leave()
    except httpx2.ReadTimeout:
        assert not stream
    left = time.monotonic()
    wait_until(lambda: not server.open_asks(), seconds=2)
    assert time.monotonic() - left < 2
