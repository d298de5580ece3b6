"""What a recovery does whose replacement takes longer to load than a recovery may take to find a place."""

from __future__ import annotations

import asyncio

import pytest
from table_fleet import TableFleet, idle, reconfigurer
from virtual_time import run_in_virtual_time

from isotherm.cluster.messages.copies import Pair


class LoadingFleet(TableFleet):
    """The replacement of a group loads for 600 seconds, `comes` of them with bytes that come."""

    def __init__(self, comes: float) -> None:
        super().__init__(["expert-0", "expert-1", "expert-2"], ["attention-0"])
        self.comes, self.began = comes, 0.0

    async def load(self, group: str, pairs: list[Pair]) -> None:
        if group == "expert-3":
            self.began = asyncio.get_running_loop().time()
            await asyncio.sleep(600.0)
        await super().load(group, pairs)

    async def loaded(self) -> dict[str, int]:
        return {"expert-3": int(min(asyncio.get_running_loop().time() - self.began, self.comes))}


@pytest.mark.parametrize(("comes", "left"), [(600.0, ["expert-0", "expert-2", "expert-3"]), (30.0, None)])
def test_a_replacement_has_its_time_as_long_as_its_weights_come(comes: float, left: list[str] | None):
    """A minute is not enough for half of a large model from a slow disk: the others took over then what was loading,
    for which there was no memory."""
    fleet = LoadingFleet(comes)
    made = reconfigurer(fleet)

    async def work() -> None:
        fleet.dead = {"expert-1"}
        made.heal()
        await idle(made)

    run_in_virtual_time(work())
    assert sorted(fleet.experts) == (left or ["expert-0", "expert-2", "expert-4"])
    assert fleet.calls.count("start expert-3") == 1
    fleet.check()
