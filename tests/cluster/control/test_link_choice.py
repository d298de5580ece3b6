from __future__ import annotations

import pytest

from isotherm.cluster.control.link_choice import LinkChoiceError, choose_link
from isotherm.cluster.messages.workers import Locality

HERE, THERE, WITHOUT = (
    Locality("boot-1/net-1/0", None),
    Locality("boot-2/net-1/0", None),
    Locality("boot-1/net-1/0", "no compiler was there"),
)
GPU = Locality("boot-1/net-1/0", None, "cuda", "GPU-1")


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
    assert chosen == kind and reason in why
    with pytest.raises(LinkChoiceError, match=reason):
        choose_link("shared-memory", shard, group)


@pytest.mark.parametrize("wanted", ["auto", "process-group"])
@pytest.mark.parametrize("machine", ["boot-1/net-1/0", "boot-2/net-1/0"])
def test_rows_go_over_nccl_between_two_gpus(wanted, machine: str):
    other = Locality(machine, None, "cuda", "GPU-2")
    assert choose_link(wanted, GPU, other) == ("process-group-nccl", "each worker computes on a GPU of its own")


@pytest.mark.parametrize("wanted", ["auto", "process-group"])
def test_rows_pass_through_the_host_within_one_gpu(wanted):
    assert choose_link(wanted, GPU, GPU) == ("process-group", "both workers share one GPU, which NCCL does not allow")


def test_what_the_manifest_says():
    assert choose_link("process-group", HERE, HERE) == ("process-group", "the manifest says so")
    assert choose_link("shared-memory", HERE, HERE) == ("shared-memory", "the manifest says so")
    assert choose_link("process-group", GPU, HERE) == ("process-group", "the manifest says so")
