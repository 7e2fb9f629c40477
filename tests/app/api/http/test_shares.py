"""Places in line: what one owner holds or waits for leaves the others' alone."""

import asyncio

import pytest

from app.api.http.shares import Shares
from app.core.errors import ServiceBusy


def test_an_owner_waits_behind_its_own_and_nobody_elses() -> None:
    """S5 b: one project that holds all it may have keeps no other one waiting."""

    async def go() -> None:
        shares = Shares(3, 2)
        async with shares.hold("a", 1, seconds=1), shares.hold("a", 1, seconds=1):
            with pytest.raises(ServiceBusy):
                async with shares.hold("a", 1, seconds=0.05):
                    pass
            async with shares.hold("b", 1, seconds=1):
                with pytest.raises(ServiceBusy):  # now there is none left for anybody
                    async with shares.hold("c", 1, seconds=0.05):
                        pass
        async with shares.hold("c", 5, seconds=1):  # more than it may have counts as all that it may have
            pass

    asyncio.run(go())


def test_what_is_given_up_goes_to_the_next_in_line() -> None:
    async def go() -> list[int]:
        shares, order = Shares(2, 2), list[int]()

        async def one(number: int, amount: int) -> None:
            async with shares.hold(f"owner {number}", amount, seconds=5):
                order.append(number)

        async with shares.hold("first", 2, seconds=1):
            waiting = [asyncio.ensure_future(one(number, 2 - number % 2)) for number in range(4)]
            left = asyncio.ensure_future(one(9, 2))
            await asyncio.sleep(0)
            left.cancel()
            await asyncio.gather(left, return_exceptions=True)
        await asyncio.gather(*waiting)
        async with shares.hold("last", 2, seconds=1):
            return order

    assert asyncio.run(go()) == [0, 1, 2, 3]
