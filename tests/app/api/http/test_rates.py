"""Rates of one owner leave the others' alone, and come back with time."""

import pytest

from app.api.http.rates import Rate, Rates, owner_of
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


def test_an_address_has_so_many_wrong_keys_a_minute() -> None:
    """S11: whoever guesses must wait; another address need not."""
    rates = Rates(EdgeSettings(wrong_keys_per_minute=2))
    for _ in range(2):
        rates.note_wrong_key("192.0.2.1")
    with pytest.raises(RateLimited):
        rates.note_wrong_key("192.0.2.1")
    rates.note_wrong_key("192.0.2.2")


def test_one_network_of_ipv6_is_one_client() -> None:
    """Review: whoever has an IPv6 address has 2**64 of them, and guessed with a new one each time."""
    rates = Rates(EdgeSettings(wrong_keys_per_minute=2))
    for number in range(2):
        rates.note_wrong_key(f"2001:db8:0:1::{number}")
    with pytest.raises(RateLimited):
        rates.note_wrong_key("2001:db8:0:1:ffff::9")
    rates.note_wrong_key("2001:db8:0:2::1")
    assert owner_of("::ffff:192.0.2.1") == owner_of("192.0.2.1") == "192.0.2.1"
    assert owner_of("fe80::1%eth0") == "fe80::"
    assert owner_of("") == ""
