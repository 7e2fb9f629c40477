"""What a malformed request is answered: the API's own words, never a class of ours or a type of Python."""

import json
import re
import warnings
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from app.api.http.json_bodies import validated
from app.api.schemas.job_create import CreateJobBody, to_create_job
from tests.app.api.test_hostile_requests import BAD_FORMS, BAD_JSON, CREATE_FAULTS
from tests.support.http import Customer

Json = dict[str, object]
JOB: Json = {"model": "tiny", "training_file": "file-x"}
CHAT: Json = {"model": "tiny", "messages": [{"role": "user", "content": "q"}]}
# a list or a set may also be plain English
PYTHON_WORDS = re.compile(
    r"\b(dict|dictionary|tuple|int|str|float|bool|none|class|instance|valid (list|set)|(list|set) should)\b",
    re.IGNORECASE,
)
WRONG: dict[str, list[object]] = {
    "object": [7, 1.5, True, "x", [], [{}]],
    "array": [7, 1.5, True, {}, {"a": 1}],
    "string": [7, 1.5, True, [], {}],
    "integer": [1.0, True, "x", [], {}],
    "number": [True, "x", [], {}],
    "flag": [7, 1.5, "x", [], {}],
}
JOB_FIELDS = {
    "object": (
        "method method.supervised method.supervised.hyperparameters method.dpo method.reinforcement metadata "
        "hyperparameters lora safety safety.antibody safety.antidote safety.gate"
    ),
    "array": "integrations lora.target_modules",
    "string": "model training_file validation_file suffix method.type",
    "integer": (
        "seed hyperparameters.n_epochs hyperparameters.batch_size lora.r method.supervised.hyperparameters.n_epochs"
    ),
    "number": (
        "hyperparameters.learning_rate_multiplier lora.alpha lora.dropout safety.gate.max_harmful_score "
        "safety.gate.min_utility safety.gate.max_drift safety.gate.max_alignment_loss"
    ),
    "flag": "dry_run safety.antibody.enabled safety.antidote.enabled",
}
CHAT_FIELDS = {
    "object": "stream_options logit_bias",
    "array": "messages stop",
    "string": "model",
    "integer": "max_completion_tokens max_tokens n seed top_logprobs",
    "number": "temperature top_p presence_penalty frequency_penalty logit_bias.1",
    "flag": "stream logprobs stream_options.include_usage",
}


def malformed(base: Json, fields: dict[str, str]) -> Iterator[tuple[str, Json]]:
    """Each field with each value that is not of its kind: where the fault is, and the whole body."""
    for kind, paths in fields.items():
        for path in paths.split():
            for value in WRONG[kind]:
                yield path, _with(base, path, value)


def _with(base: Json, path: str, value: object) -> Json:
    first, _, rest = path.partition(".")
    if not rest:
        return {**base, first: value}
    inner = {"type": "supervised"} if first == "method" else {}
    return {**base, first: _with(dict(inner), rest, value)}


def models_of(base: type[BaseModel] = BaseModel) -> Iterator[str]:
    """The names of our own body and settings classes."""
    for model in base.__subclasses__():
        if model.__module__.partition(".")[0] in {"app", "finetuning"}:
            yield model.__name__
        yield from models_of(model)


def assert_own_words(message: str) -> None:
    """No class and no type of Python is named."""
    assert not set(re.findall(r"\w+", message)) & set(models_of()), message
    assert not PYTHON_WORDS.search(message), message


@pytest.mark.parametrize(
    ("path", "base", "fields"),
    [("/fine_tuning/jobs", JOB, JOB_FIELDS), ("/chat/completions", CHAT, CHAT_FIELDS)],
    ids=["jobs", "chat"],
)
def test_a_field_of_the_wrong_kind_is_refused_in_our_own_words(
    customer: Customer, path: str, base: Json, fields: dict[str, str]
) -> None:
    for param, body in malformed(base, fields):
        reply = customer.http.post(path, json=body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text
        assert_own_words(reply.json()["error"]["message"])


@pytest.mark.parametrize(
    "fields",
    [
        {"stop": ["a"] * 5},
        {"stop": ["", "b" * 300]},
        {"logit_bias": {str(token): 1 for token in range(301)}},
        {"messages": ["q"]},
        {"messages": [{"role": ["user"], "content": "q"}]},
        {"messages": [{"role": "user", "content": {}}]},
        {"messages": [{"role": "user", "content": "q", "name": 7, "more": 1}]},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_a_chat_out_of_range_is_refused_in_our_own_words(customer: Customer, fields: Json) -> None:
    reply = customer.http.post("/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 400
    assert_own_words(reply.json()["error"]["message"])


def test_the_hostile_creates_are_refused_in_our_own_words(customer: Customer) -> None:
    for fields, _, _ in CREATE_FAULTS:
        assert_own_words(customer.create(**fields).json()["error"]["message"])
    for body, _, _ in BAD_JSON:
        kind = {"Content-Type": "application/json"}
        assert_own_words(customer.http.post("/fine_tuning/jobs", content=body, headers=kind).json()["error"]["message"])


def test_the_hostile_uploads_and_lists_are_refused_in_our_own_words(customer: Customer) -> None:
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    for form, _, _ in BAD_FORMS:
        assert_own_words(customer.http.post("/files", content=form, headers=kind).json()["error"]["message"])
    for query in ("limit=x", "limit=0", "limit=1&limit=2", "order=up", "order=asc&order=asc", "after=", "after=x"):
        reply = customer.http.get(f"/files?{query}")
        assert reply.status_code == 400
        assert_own_words(reply.json()["error"]["message"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora": []}, "lora: Input should be an object."),
        ({"method": 7}, "method: Input should be an object."),
        ({"hyperparameters": "x"}, "hyperparameters: Input should be an object."),
        ({"integrations": [7]}, "integrations[0]: Input should be an object."),
        ({"integrations": {}}, "integrations: Input should be a valid array."),
        ({"lora": {"target_modules": "q"}}, "lora.target_modules: Input should be a valid array."),
        ({"metadata": []}, "metadata: must be an object of strings."),
        ({"seed": 1.0}, "seed: must be an integer."),
        ({"seed": True}, "seed: must be an integer."),
        ({"seed": "x"}, "seed: must be an integer."),
        ({"seed": -1}, "seed: must lie within 0 and 2147483647."),
        ({"seed": 2**31}, "seed: must lie within 0 and 2147483647."),
        ({"hyperparameters": {"n_epochs": 0}}, 'hyperparameters.n_epochs: must be an integer from 1 to 50, or "auto".'),
        ({"metadata": {"": "x"}}, "metadata: keys must have 1 to 64 characters."),
    ],
    ids=str,
)
def test_the_sentence_says_what_the_field_should_be(customer: Customer, fields: Json, message: str) -> None:
    assert customer.create(**fields).json()["error"]["message"] == message


def test_a_whole_multiplier_is_stored_and_shown_as_a_float(customer: Customer) -> None:
    reply = customer.create(hyperparameters={"learning_rate_multiplier": 2})
    assert json.loads(reply.text, parse_int=lambda _: None)["hyperparameters"]["learning_rate_multiplier"] == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body = validated(CreateJobBody, {**JOB, "hyperparameters": {"learning_rate_multiplier": 2}})
        body.model_dump(mode="json")
        stored = to_create_job(body).model_dump_json()
    assert json.loads(stored, parse_int=lambda _: None)["hyperparameters"]["learning_rate_multiplier"] == 2.0
