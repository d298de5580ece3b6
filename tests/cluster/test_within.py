"""What takes too long is cancelled, and so is who waits for it."""

from __future__ import annotations

import asyncio

import pytest
from virtual_time import run_in_virtual_time

from isotherm.cluster.within import within


def test_what_takes_too_long_is_cancelled():
    ended: list[str] = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return "done"

    async def main() -> None:
        assert await within(1.0, work(0.0)) == "done"
        with pytest.raises(TimeoutError, match=r"^not within 0\.01 s$"):
            await within(0.01, work(60.0))
        assert ended == ["cancelled"]
        whole = asyncio.ensure_future(within(60.0, work(60.0)))
        await asyncio.sleep(0.01)
        whole.cancel()
        await asyncio.wait([whole])
        assert whole.cancelled() and ended == ["cancelled"] * 2

    run_in_virtual_time(main())


def test_what_is_cancelled_as_the_work_ends_is_cancelled():
    """A task that asks again and again would never end else."""

    async def main() -> None:
        ends = asyncio.get_running_loop().create_future()

        async def again_and_again() -> None:
            while True:
                await within(60.0, ends)

        task = asyncio.ensure_future(again_and_again())
        await asyncio.sleep(0)
        ends.set_result(None)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=1.0)
        assert done and task.cancelled()

    run_in_virtual_time(main())
