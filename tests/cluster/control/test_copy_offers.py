"""Groups are asked at once, and nobody waits for one that hangs: in virtual time."""

from __future__ import annotations

import asyncio
import logging

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.control.copy_offers import OFFER_SECONDS, copy_offers
from isotherm.cluster.messages.copies import CopyOffer, CopySource

WANTED = {"a": [(1, 0)], "b": [(1, 1), (1, 2)]}


def offer(group: str) -> CopyOffer:
    return CopyOffer(group, "tiles", b"key", ("host", 1))


def asked(answers) -> tuple[list[CopySource], float]:
    async def ask(group: str) -> CopyOffer | None:
        return await answers(group)

    async def go() -> tuple[list[CopySource], float]:
        return await copy_offers(WANTED, ask), asyncio.get_running_loop().time()

    return run_in_virtual_time(go())


def test_what_is_offered_is_taken():
    async def answers(group: str) -> CopyOffer:
        await asyncio.sleep(1.0)
        return offer(group)

    both = [CopySource(offer("a"), ((1, 0),)), CopySource(offer("b"), ((1, 1), (1, 2)))]
    assert asked(answers) == (both, 1.0)


@pytest.mark.parametrize("fault, seconds", [("hangs", OFFER_SECONDS), ("dies", 0.0)])
def test_who_hangs_or_dies_is_left_out(caplog: pytest.LogCaptureFixture, fault: str, seconds: float):
    caplog.set_level(logging.WARNING)

    async def answers(group: str) -> CopyOffer:
        if group == "a" and fault == "hangs":
            await asyncio.Event().wait()
        if group == "a":
            raise ConnectionError("it is gone")
        return offer(group)

    found, took = asked(answers)
    assert [source.offer.group for source in found] == ["b"] and took == seconds
    assert caplog.messages[0].startswith("a offers no copies of its experts: ")


def test_who_packs_what_nobody_can_take_is_left_out():
    async def answers(group: str) -> None:
        return None

    assert asked(answers) == ([], 0.0)
