"""Which messages a worker takes for its own. What becomes of the others: test_kills.py."""

import base64
import json
from typing import Any

import pytest
from celery import Celery

from app.core.broker import CPU_QUEUE, RUN_JOB, Wake, wake
from app.core.settings import Settings
from tests.support.backends import broker_client
from worker.messages import is_ours


def sent(broker: Celery, settings: Settings) -> dict[str, Any]:
    """A message as `broker.wake` leaves it in its queue."""
    wake(broker, Wake(RUN_JOB, "ftjob-x", CPU_QUEUE))
    message: dict[str, Any] = json.loads(broker_client(settings).rpop(CPU_QUEUE))
    return message


def test_what_the_service_sends_is_ours(broker: Celery, settings: Settings) -> None:
    assert is_ours(sent(broker, settings))


@pytest.mark.parametrize("arguments", [[], [5], [""], ["a\nb"], ["x" * 200], ["a", "b"], [["a"]], [{"a": 1}]])
def test_arguments_that_are_no_id_are_not(broker: Celery, settings: Settings, arguments: list[object]) -> None:
    """S23: P8 says that a message carries one id."""
    body = base64.b64encode(json.dumps([arguments, {}, {}]).encode()).decode()
    assert not is_ours({**sent(broker, settings), "body": body})


@pytest.mark.parametrize(
    "changes",
    [
        {"headers": {"task": "os.system"}},
        {"headers": None},
        {"content-type": "application/x-python-serialize"},
        {"body": "not base64"},
        {"body": base64.b64encode(b"not json").decode()},
        {"body": base64.b64encode(b'[["a"], {"k": 1}, {}]').decode()},
        {"properties": {}},
        {"headers": {"task": RUN_JOB}},
    ],
)
def test_other_envelopes_are_not(broker: Celery, settings: Settings, changes: dict[str, object]) -> None:
    """S23: neither a task of somebody else's nor any other encoding is looked at."""
    assert not is_ours({**sent(broker, settings), **changes})


@pytest.mark.parametrize("header", [{"id": 5}, {"timelimit": 5}, {"eta": "x"}, {"retries": "x"}, {"task": ["a"]}])
def test_headers_that_celery_would_believe_are_not(
    broker: Celery, settings: Settings, header: dict[str, object]
) -> None:
    """S23: a header of another shape left the worker waiting for ever, or ended it."""
    message = sent(broker, settings)
    assert not is_ours({**message, "headers": {**message["headers"], **header}})


@pytest.mark.parametrize("message", [None, 5, "garbage", [], {}, {"body": 1}])
def test_other_values_are_not(message: object) -> None:
    assert not is_ours(message)
