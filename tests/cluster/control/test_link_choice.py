from __future__ import annotations

from dataclasses import replace

import pytest

from isotherm.cluster.control import link_choice
from isotherm.cluster.control.link_choice import RULES, LinkChoiceError, LinkRule, choices, choose_link
from isotherm.cluster.messages.workers import Locality

HERE, THERE = Locality("boot-1/net-1/0"), Locality("boot-2/net-1/0")
WITHOUT = Locality("boot-1/net-1/0", {"shared-memory": "no compiler was there"})
GPU = Locality("boot-1/net-1/0", {}, "cuda", "GPU-1")


def test_auto_takes_shared_memory_within_a_host():
    assert choose_link("auto", HERE, HERE) == ("shared-memory", "both workers are on one host")


@pytest.mark.parametrize(("shard", "group", "kind", "reason"), [
    (HERE, THERE, "process-group", "different hosts"),
    (WITHOUT, HERE, "process-group", "the shard cannot have it: no compiler"),
    (HERE, WITHOUT, "process-group", "the group cannot have it: no compiler"),
    (GPU, HERE, "process-group", "the shard's rows are on cuda"),
    (HERE, GPU, "process-group", "the group's rows are on cuda"),
])  # fmt: skip
def test_where_it_cannot_be_had(shard: Locality, group: Locality, kind: str, reason: str):
    chosen, why = choose_link("auto", shard, group)
    assert chosen == kind and f"no shared-memory, since {reason}" in why.replace("the workers are on ", "")
    with pytest.raises(LinkChoiceError, match=reason):
        choose_link("shared-memory", shard, group)


@pytest.mark.parametrize("wanted", ["auto", "process-group"])
@pytest.mark.parametrize("machine", ["boot-1/net-1/0", "boot-2/net-1/0"])
def test_rows_go_over_nccl_between_two_gpus(wanted, machine: str):
    chosen, why = choose_link(wanted, GPU, Locality(machine, {}, "cuda", "GPU-2"))
    assert chosen == "process-group-nccl"
    because = "each worker computes on a GPU of its own" if wanted == "auto" else "the manifest says so"
    assert why.split("; ")[0] == because


@pytest.mark.parametrize("wanted", ["auto", "process-group"])
def test_rows_pass_through_the_host_within_one_gpu(wanted):
    chosen, why = choose_link(wanted, GPU, GPU)
    assert chosen == "process-group"
    assert why.endswith("; no process-group-nccl, since both workers share one GPU, which NCCL does not allow")


@pytest.mark.parametrize("end", ["shard", "group"])
def test_rows_pass_through_the_host_where_a_worker_has_no_nccl(end: str):
    ends = {"shard": GPU, "group": replace(GPU, gpu="GPU-2")}
    ends[end] = replace(ends[end], unable={"process-group-nccl": "this torch has none"})
    chosen, why = choose_link("auto", ends["shard"], ends["group"])
    assert chosen == "process-group" and f"the {end} cannot have it: this torch has none" in why


def test_what_the_manifest_says():
    assert choices() == ("auto", "shared-memory", "process-group")
    assert choose_link("shared-memory", HERE, HERE) == ("shared-memory", "the manifest says so")
    for shard, where in ((HERE, "the shard's rows are on cpu"), (GPU, "the group's rows are on cpu")):
        why = f"the manifest says so; no process-group-nccl, since {where}"
        assert choose_link("process-group", shard, HERE) == ("process-group", why)


def test_a_rule_is_all_that_a_further_kind_needs_here(monkeypatch: pytest.MonkeyPatch):
    only_apart = LinkRule(
        "pigeon", "pigeon", "they are far apart", lambda a, b: "too near" if a.machine == b.machine else None
    )
    monkeypatch.setattr(link_choice, "RULES", (only_apart, *RULES))
    assert choices() == ("auto", "pigeon", "shared-memory", "process-group")
    assert choose_link("auto", HERE, THERE) == ("pigeon", "they are far apart")
    assert choose_link("pigeon", HERE, THERE) == ("pigeon", "the manifest says so")
    assert choose_link("auto", HERE, HERE)[0] == "shared-memory"
    with pytest.raises(LinkChoiceError, match=r'links\.kind is "pigeon", but there can be no pigeon, since too near'):
        choose_link("pigeon", HERE, HERE)
