"""Rates of one owner leave the others' alone, and come back with time."""

import pytest

from app.api.http.rates import Rate, Rates
from app.core.errors import RateLimited
from app.core.settings import EdgeSettings
from tests.support.waiting import wait_until


def test_a_rate_is_used_up_and_comes_back() -> None:
    """S11: what is refused uses nothing up."""
    rate = Rate(600)
    assert rate.take("a", 590).remaining == 10
    refused = rate.take("a", 300)
    assert 25 < refused.wait_seconds <= 30
    assert rate.take("a", 5).wait_seconds == 0
    assert rate.take("b", 10_000).remaining == 0  # more than there ever is counts as all of it
    assert rate.take("b").wait_seconds > 0
    wait_until(lambda: not rate.take("b").wait_seconds, seconds=10)
    assert rate.change("b", -1000).remaining == 600


def test_a_project_has_so_many_answers_in_progress() -> None:
    """S11: one tenant's streams do not fill the model server."""
    rates = Rates(EdgeSettings(chats=2))
    with rates.chat("a"), rates.chat("a"), rates.chat("b"), pytest.raises(RateLimited), rates.chat("a"):
        pass
    with rates.chat("a"), rates.chat("a"):
        pass


def test_a_key_that_was_right_is_known_wherever_it_comes_from() -> None:
    """S11: a guesser behind the same address locks out nobody who is at work."""
    rates = Rates(EdgeSettings(wrong_keys_per_minute=2))
    rates.note_key("elsewhere", b"right", is_right=True)
    for _ in range(2):
        rates.check_address("here", b"guess")
        rates.note_key("here", b"guess", is_right=False)
    rates.check_address("here", b"right")
    rates.check_address("elsewhere", b"guess")
    with pytest.raises(RateLimited):
        rates.check_address("here", b"guess")
