"""Cores, instruction set, kernels, memory."""

from __future__ import annotations

from dataclasses import dataclass

from isotherm.cluster.doctor.finding import Finding, fail, ok, warn
from isotherm.cluster.machine_memory import free_memory, machine_memory
from isotherm.cluster.manifest import human_bytes
from isotherm.kernels.cpus import allowed_cpus, cpu_quota
from isotherm.kernels.select import select_kernels

LEAST_MEMORY, GOOD_MEMORY = 1 << 30, 4 << 30  # bytes free: Ray and the workers of a tiny model take about 2 GiB


@dataclass(frozen=True)
class MachineFacts:
    """`quota`: cores' worth of time that the control group allows; None: all of them. `instructions`: what the kernels
    were built for and use here; `kernels_reason`: why these kernels."""

    cores: int
    quota: float | None
    memory: int
    free_memory: int
    kernels: str
    instructions: str
    kernels_reason: str


def look_at_machine() -> MachineFacts:
    import torch

    selection = select_kernels("auto", torch.bfloat16)
    kernels = selection.kernels
    return MachineFacts(
        cores=allowed_cpus(),
        quota=cpu_quota(),
        memory=machine_memory(),
        free_memory=free_memory(),
        kernels=kernels.name,
        instructions=kernels.instructions,
        kernels_reason=selection.reason,
    )


def judge_machine(facts: MachineFacts) -> list[Finding]:
    return [_cores(facts), _kernels(facts), _memory(facts)]


def _cores(facts: MachineFacts) -> Finding:
    if facts.quota is not None and facts.quota < facts.cores:
        return warn(
            "cores",
            f"{facts.cores} cores, of whose time the control group allows {facts.quota:g}",
            f"a worker has {max(1, int(facts.quota))} threads at most, unless attention.threads or experts.threads ask "
            "for more, which would be stopped in mid-step; to have more of them, raise the limit (docker run --cpus)",
        )
    if facts.cores < 2:
        return warn("cores", "1 core", "shards and groups share it; a model of any size wants more")
    return ok("cores", f"{facts.cores} cores")


def _kernels(facts: MachineFacts) -> Finding:
    if facts.kernels == "reference":
        return warn(
            "kernels",
            facts.kernels_reason,
            "slow, and bits that depend on the batch; install a C++ compiler (g++) and install isotherm again",
        )
    if facts.instructions == "generic":
        return warn(
            "kernels", "native, without AVX2", "this processor has none, or a virtual machine hides it: it will be slow"
        )
    return ok("kernels", f"{facts.kernels}, {facts.instructions}")


def _memory(facts: MachineFacts) -> Finding:
    words = f"{human_bytes(facts.free_memory)} free of {human_bytes(facts.memory)}"
    if facts.free_memory < LEAST_MEMORY:
        return fail("memory", words, "Ray and the smallest workers take about 2 GiB: free some, or raise the limit")
    if facts.free_memory < GOOD_MEMORY:
        return warn("memory", words, "enough for the bundled model alone")
    return ok("memory", words)
