"""The worker actors as Ray knows them. Whoever starts or finds an actor has Ray import its class: the driver, the
controller, each ingress replica and each command. What a worker is made of, PyTorch first, takes a second and 250 MB,
so only its own process imports that; these classes have the methods that others call, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, ClassVar

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.messages.requests import Delta
from isotherm.cluster.messages.workers import WorkerSpec


def _method_of_hosted(name: str) -> Callable[..., Any]:
    async def method(self: Hosted, *args: Any) -> Any:
        return await getattr(self.hosted, name)(*args)

    method.__name__ = method.__qualname__ = name  # Ray shows it
    return method


class Hosted:
    """An actor of which each of `methods` is that of the object that its process has made."""

    methods: ClassVar[tuple[str, ...]] = ()
    common: ClassVar = (
        "fingerprint", "locality", "meter", "order", "pid", "sentinel", "sign_of_life", "status", "waits_for"
    )  # fmt: skip

    def __init__(self, *args: Any):
        self.hosted = self.implementation()(*args)

    def __init_subclass__(cls) -> None:
        for name in (*cls.common, *cls.methods):
            setattr(cls, name, _method_of_hosted(name))

    @staticmethod
    def implementation() -> type:
        """The class to be hosted, imported when this is called."""
        raise NotImplementedError


class AttentionShard(Hosted):
    """actors/attention/shard.py; it is started with a WorkerSpec, its host's IP address and a SchedulerConfig."""

    methods = ("expect_experts", "failed_links", "held_up", "open_requests", "rows_routed", "submit")

    def __init__(self, spec: WorkerSpec, host: str, scheduler: SchedulerConfig):
        super().__init__(spec, host, scheduler)

    @staticmethod
    def implementation() -> type:
        from isotherm.actors.attention.shard import AttentionShard

        return AttentionShard

    async def stream(self, connection: str) -> AsyncIterator[list[Delta]]:
        async with aclosing(self.hosted.stream(connection)) as lists:
            async for deltas in lists:
                yield deltas


class ExpertGroup(Hosted):
    """actors/experts/group.py; it is started with a WorkerSpec, its host's IP address and its number of slots for
    experts."""

    methods = ("held",)

    def __init__(self, spec: WorkerSpec, host: str, slots: int):
        super().__init__(spec, host, slots)

    @staticmethod
    def implementation() -> type:
        from isotherm.actors.experts.group import ExpertGroup

        return ExpertGroup
