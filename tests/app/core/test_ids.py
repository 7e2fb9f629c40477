import re

import pytest

from app.core.ids import Prefix, is_id, new_id


@pytest.mark.parametrize("prefix", Prefix)
def test_ids_have_the_contract_shape_and_differ(prefix: Prefix) -> None:
    text, width = prefix.value
    made = {new_id(prefix) for _ in range(500)}
    assert len(made) == 500
    assert all(re.fullmatch(f"{text}[A-Za-z0-9]{{{width}}}", value) and is_id(prefix, value) for value in made)


def test_a_later_id_sorts_after_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**18, 10**18 + 50 * 10**6, 10**6))
    monkeypatch.setattr("time.time_ns", lambda: next(clock))
    made = [new_id(Prefix.JOB) for _ in range(50)]
    assert made == sorted(made)


@pytest.mark.parametrize("value", ["", "file-", "ftjob-" + "a" * 23, "ftjob-" + "a" * 23 + "/", "file-" + "a" * 24])
def test_other_text_is_no_job_id(value: str) -> None:
    assert not is_id(Prefix.JOB, value)
