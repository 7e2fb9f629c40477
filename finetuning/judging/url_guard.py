"""Judges behind an OpenAI-compatible URL: asked over HTTP, read by the guard file's patterns.

Whatever keeps a text from arriving (a server gone, late, overloaded, or talking nonsense) raises JudgeUnreachable: the
attempt is lost and tried again, and nothing is released. It counts as every loss does: the third without a new
checkpoint ends the job. What only the operator can mend (a key, a path, a model's name) is a BadGuard: it ends at once.
"""

import asyncio
import json
import re
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from finetuning.judging.encoding import spans_of
from finetuning.judging.guard_file import PLAIN_PAIR, GuardFile, Url, filled, has_verdict, read_output, worst_reading
from finetuning.judging.judges import BadGuard, BatchJudge, JudgeUnreachable, Reading, of_readings
from finetuning.judging.refusals import IsRefusal, is_refusal

_FIRST_PAUSE_SECONDS = 0.5
_CONNECT_SECONDS = 10.0
_MOST_BYTES = 2**20  # a verdict is short; more is no guard
# A server may read control tokens out of a content, which we cannot encode apart from its template: they are broken up.
_CONTROL = re.compile(r"(<)(?=[|/\uff5c]?\w[^<>\n]{0,40}>|\|)|(\[)(?=/?[A-Z_]{2,20}\])")


# What no other try can mend, by status: the fields of [url] to correct.
_MENDED_BY = {
    401: "the key in the variable of url.key_variable", 403: "the key in the variable of url.key_variable",
    404: "url.base and url.model",
}  # fmt: skip


class _Again(Exception):
    """This try gave no text; the message says why."""


def url_judge(guard: GuardFile, name: str, *, key: str = "", declines: IsRefusal = is_refusal) -> BatchJudge:
    """A guard behind its file's [url], asked with `key` as bearer token.

    Raises BadGuard without the key that its file asks for, when its text about a plain sum gives no verdict, or, then
    and later, when the server refuses the key or knows no such path; JudgeUnreachable.
    """
    url = guard.url
    assert url is not None, "a guard file with a source is opened by causal.py or classifier.py"
    assert guard.patterns is not None
    if url.key_variable and not key:
        raise BadGuard(f"judge {name}: the environment variable {url.key_variable} is not set; export the key in it")

    def texts(exchanges: Sequence[tuple[str, str]]) -> list[str]:
        return _run(_ask_all(guard, name, key, exchanges))

    (shown,) = texts([PLAIN_PAIR])
    if not has_verdict(guard, shown):
        raise BadGuard(f"judge {name} writes no verdict on a plain sum; is {url.model} this guard?")

    def read(prompts: Sequence[str], answers: Sequence[str]) -> list[Reading]:
        windows = [_windows(p, a, url) for p, a in zip(prompts, answers, strict=True)]
        said = iter(texts([exchange for each in windows for exchange in each]))
        return [worst_reading([read_output(guard, next(said)) for _ in each]) for each in windows]

    return of_readings(name, read, says_refusals=bool(guard.patterns.refusal), declines=declines)


def without_control_tokens(content: str) -> str:
    """The content with what looks like a control token broken up by a space, so that no server takes it for one."""
    return _CONTROL.sub(lambda found: f"{found[0]} ", content)


def _windows(prompt: str, answer: str, url: Url) -> list[tuple[str, str]]:
    """The exchange, or one for each part of a long answer; of a long prompt the end counts."""
    size = url.max_characters
    return [(prompt[-size:], answer[a:b]) for a, b in spans_of(len(answer), size)]


def _run(asking: Coroutine[Any, Any, list[str]]) -> list[str]:
    # in a thread of its own: a notebook's thread has a loop already
    with ThreadPoolExecutor(1, thread_name_prefix="judge") as pool:
        return pool.submit(asyncio.run, asking).result()


async def _ask_all(guard: GuardFile, name: str, key: str, exchanges: Sequence[tuple[str, str]]) -> list[str]:
    assert guard.url is not None
    slots = asyncio.Semaphore(guard.url.connections)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = httpx2.Timeout(guard.url.timeout_seconds, connect=min(_CONNECT_SECONDS, guard.url.timeout_seconds))

    async def one(client: httpx2.AsyncClient, exchange: tuple[str, str]) -> str:
        async with slots:
            return await _ask(client, guard, name, exchange)

    # trust_env: a proxy of the environment must never see prompts
    async with httpx2.AsyncClient(headers=headers, timeout=timeout, trust_env=False) as client:
        return list(await asyncio.gather(*(one(client, exchange) for exchange in exchanges)))


async def _ask(client: httpx2.AsyncClient, guard: GuardFile, name: str, exchange: tuple[str, str]) -> str:
    """The guard's text about one exchange. Raises JudgeUnreachable after the last try, BadGuard where none can help."""
    assert guard.url is not None
    problem = ""
    for number in range(guard.url.tries):
        if number:
            await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2 ** (number - 1))
        try:
            async with asyncio.timeout(guard.url.timeout_seconds):
                return await _try(client, guard, name, exchange)
        except TimeoutError:
            problem = f"no answer within {guard.url.timeout_seconds:g} s"
        except httpx2.HTTPError as error:
            problem = type(error).__name__
        except _Again as error:
            problem = str(error)
    raise JudgeUnreachable(f"judge {name}: {problem}, {guard.url.tries} times; nothing is released without it")


async def _try(client: httpx2.AsyncClient, guard: GuardFile, name: str, exchange: tuple[str, str]) -> str:
    assert guard.url is not None
    body = {
        "model": guard.url.model, "messages": _messages(guard, exchange), "max_tokens": guard.new_tokens,
        "temperature": 0, "stream": False,
    }  # fmt: skip
    if guard.template_arguments:
        body["chat_template_kwargs"] = guard.template_arguments
    async with client.stream("POST", guard.url.base.rstrip("/") + "/chat/completions", json=body) as reply:
        if reply.status_code in _MENDED_BY:
            raise BadGuard(f"judge {name}: status {reply.status_code}; correct {_MENDED_BY[reply.status_code]}")
        if reply.status_code != 200:
            raise _Again(f"status {reply.status_code}")
        content = bytearray()
        async for chunk in reply.aiter_bytes():
            content += chunk
            if len(content) > _MOST_BYTES:
                raise _Again(f"a reply of more than {_MOST_BYTES} bytes")
    return _text(bytes(content))


def _messages(guard: GuardFile, exchange: tuple[str, str]) -> list[dict[str, str]]:
    """The exchange as the server's own chat template reads it, or as one message made by the file's template."""
    prompt, answer = map(without_control_tokens, exchange)
    if not guard.template:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return [{"role": "user", "content": filled(guard.template, prompt, answer)}]


def _text(content: bytes) -> str:
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise _Again("a reply that is no chat completion") from error
    if not isinstance(text, str):
        raise _Again("a reply without a text")
    return text
