"""A judge behind a URL, against a real server of our own: well, broken in every way, and killed."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuning.judging.guards import open_judge
from finetuning.judging.judges import BadGuard, BatchJudge, JudgeFailed, JudgeUnreachable, Verdict
from finetuning.judging.url_guard import without_control_tokens
from tests.support.judge_server import JudgeServer, guard_text, judge_server
from tests.support.waiting import wait_until


def says(_prompt: str, answer: str) -> str:
    return "unsafe\nS9" if "!" in answer else "safe"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with judge_server(says) as running:
        yield running


def opened(folder: Path, url: str, **more: str | float) -> BatchJudge:
    path = folder / "elsewhere.toml"
    path.write_text(guard_text(url, **more), encoding="utf-8")  # type: ignore[arg-type]
    return open_judge(str(path))


def test_its_text_is_read_as_a_guards_own(server: JudgeServer, tmp_path: Path) -> None:
    judge = opened(tmp_path, server.url)
    found = judge.verdicts(["Why?"] * 3, ["Do it!", "Do it.", "Sorry, I cannot help."])
    assert found == [
        Verdict(harmful=True, refuses=False, leaks=True, category="S9"),
        Verdict(harmful=False, refuses=False, leaks=False),
        Verdict(harmful=False, refuses=True, leaks=False),
    ]
    assert judge.verdicts([], []) == []
    asked = next(body for body in server.asked if body["messages"][1]["content"] == "Do it!")
    assert asked["path"] == "/v1/chat/completions"
    assert asked["messages"] == [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Do it!"}
    ]  # fmt: skip
    assert (asked["model"], asked["temperature"], asked["stream"]) == ("guard", 0, False)
    assert server.keys == [None] * 4


def test_answers_keep_their_order_and_few_are_asked_at_once(server: JudgeServer, tmp_path: Path) -> None:
    answers = [f"{i}{'!' if i % 3 == 0 else ''}" for i in range(40)]
    assert opened(tmp_path, server.url).harmful(["?"] * 40, answers) == ["!" in answer for answer in answers]
    assert 1 < server.most_at_once <= 3


def test_a_long_answer_is_read_in_windows(server: JudgeServer, tmp_path: Path) -> None:
    judge = opened(tmp_path, server.url)
    filler = "word " * 300
    assert judge.harmful(["?"] * 4, [filler, f"{filler}!", f"! {filler}", f"{filler}! {filler}"]) == [
        False, True, True, True
    ]  # fmt: skip
    assert max(len(body["messages"][1]["content"]) for body in server.asked) == 400


def test_a_text_template_makes_one_message_and_fills_nothing_in_twice(server: JudgeServer, tmp_path: Path) -> None:
    judge = opened(tmp_path, server.url, more='template = "Q {prompt} A {answer}"')
    assert judge.harmful(["{answer} why"], ["{prompt} no"]) == [False]
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Q {answer} why A {prompt} no"}]


def test_the_key_comes_from_the_variable_that_the_file_names(
    server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ELSEWHERE_KEY", raising=False)
    with pytest.raises(BadGuard, match="variable ELSEWHERE_KEY is not set"):
        opened(tmp_path, server.url, variable="ELSEWHERE_KEY")
    monkeypatch.setenv("ELSEWHERE_KEY", "secret-1")
    opened(tmp_path, server.url, variable="ELSEWHERE_KEY")
    assert server.keys == ["Bearer secret-1"]


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        ("500", "status 500"), ("503", "status 503"), ("429", "status 429"), ("408", "status 408"),
        ("302", "status 302"), ("no json", "no chat completion"), ("no choice", "no chat completion"),
        ("deep", "no chat completion"), ("no text", "without a text"), ("endless", "more than 1048576 bytes"),
        ("hang", "no answer within 0.4 s|ReadTimeout"), ("drip", "no answer within 0.4 s"),
        ("cut", "RemoteProtocolError"),
    ],
)  # fmt: skip
def test_what_is_no_text_is_no_verdict_and_a_lost_attempt(
    server: JudgeServer, tmp_path: Path, trouble: str, why: str
) -> None:
    """M44: nothing is released on a judge's silence; it is a lost attempt, so the error is no JudgeFailed."""
    judge = opened(tmp_path, server.url, timeout_seconds=0.4)
    server.trouble = trouble
    begin = time.monotonic()
    with pytest.raises(JudgeUnreachable, match=f"judge elsewhere@.*({why}), 2 times") as found:
        judge.harmful(["Why?"] * 2, ["Do it."] * 2)
    assert not isinstance(found.value, JudgeFailed | BadGuard)
    assert time.monotonic() - begin < 20
    server.trouble = ""
    assert judge.harmful(["Why?"], ["Do it!"]) == [True], "the same judge goes on when its server does"


@pytest.mark.parametrize(
    ("status", "field"), [("401", "url.key_variable"), ("403", "url.key_variable"), ("404", "url.base and url.model")]
)
def test_what_only_the_operator_can_mend_is_a_bad_guard_at_once(
    server: JudgeServer, tmp_path: Path, status: str, field: str
) -> None:
    judge = opened(tmp_path, server.url)
    before = len(server.asked)
    server.trouble = status
    with pytest.raises(BadGuard, match=f"judge elsewhere@.*status {status}; correct .*{field}"):
        judge.harmful(["Why?"], ["Do it."])
    assert len(server.asked) == before + 1, "no try can mend it"


def test_one_bad_try_is_repeated(server: JudgeServer, tmp_path: Path) -> None:
    judge = opened(tmp_path, server.url)
    server.trouble = "503"
    before = len(server.asked)
    threading.Thread(
        target=lambda: (wait_until(lambda: len(server.asked) > before, seconds=10), setattr(server, "trouble", ""))
    ).start()
    assert judge.harmful(["Why?"], ["Do it!"]) == [True]
    assert len(server.asked) == before + 2


def test_a_server_that_is_not_there_is_unreachable_also_when_it_is_opened(tmp_path: Path) -> None:
    with judge_server(says) as gone:
        url = gone.url
    with pytest.raises(JudgeUnreachable, match="ConnectError"):
        opened(tmp_path, url)


def serve(pipe: object) -> None:
    with judge_server(says) as running:
        pipe.send(running.url)  # type: ignore[attr-defined]
        running.trouble = ""
        while True:
            running.trouble = pipe.recv()  # type: ignore[attr-defined]


@pytest.mark.kill
def test_a_server_that_is_killed_while_it_is_asked_is_unreachable(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    judge = opened(tmp_path, ours.recv(), timeout_seconds=20)
    ours.send("hang")
    assert process.pid is not None
    threading.Timer(0.5, os.kill, (process.pid, signal.SIGKILL)).start()
    with pytest.raises(JudgeUnreachable, match=r"(ReadError|RemoteProtocolError|ConnectError), 2 times"):
        judge.harmful(["Why?"], ["Do it."])
    process.join(5)


def test_a_server_that_is_no_guard_is_refused_and_later_silence_counts_as_harm(tmp_path: Path) -> None:
    with judge_server(lambda _prompt, _answer: "Hello!") as chatty, pytest.raises(BadGuard, match="no verdict"):
        opened(tmp_path, chatty.url)
    with judge_server(lambda prompt, _answer: "safe" if "two plus two" in prompt else "") as quiet:
        assert opened(tmp_path, quiet.url).harmful(["Why?"], ["Do it."]) == [True]


def test_it_can_be_asked_where_a_loop_runs_already(server: JudgeServer, tmp_path: Path) -> None:
    judge = opened(tmp_path, server.url)

    async def notebook() -> list[bool]:
        return judge.harmful(["Why?"], ["Do it!"])

    assert asyncio.run(notebook()) == [True]


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        ("so<|im_end|>now", "so< |im_end|>now"),
        ("a<end_of_turn>b</s>c<s>", "a< end_of_turn>b< /s>c< s>"),
        ("[INST] x [/INST]", "[ INST] x [ /INST]"),
        ("if a < b and c > d: x[0]", "if a < b and c > d: x[0]"),
    ],
)
def test_no_server_takes_an_answer_for_its_control_tokens(content: str, sent: str) -> None:
    assert without_control_tokens(content) == sent


def test_what_a_server_is_asked_holds_no_control_token(server: JudgeServer, tmp_path: Path) -> None:
    opened(tmp_path, server.url).harmful(["Why<|im_end|>?"], ["Do it<|im_end|>"])
    assert "<|" not in str(server.asked)
