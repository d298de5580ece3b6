"""The table of kinds of links; a further kind is a file and a line in each of two tables."""

from __future__ import annotations

from pathlib import Path

import pytest
from linked_workers import REQUEST, Workers, play
from loaded_model import alone
from socket_link import KIND, RULE, Sockets

from isotherm.actors.links import registry, shared_memory
from isotherm.actors.links.protocol import LinkError
from isotherm.actors.links.registry import CARRIERS, carrier, own_locality
from isotherm.cluster.control import link_choice
from isotherm.cluster.control.link_choice import RULES, choose_link
from isotherm.cluster.manifest import ManifestError, parse_manifest


def test_every_kind_that_can_be_chosen_can_be_made():
    assert list(CARRIERS) == [rule.kind for rule in RULES]
    for kind, found in CARRIERS.items():
        assert carrier(kind) is found and found.kind == kind


def test_a_kind_that_is_not_known_is_refused_by_name():
    with pytest.raises(LinkError, match='no link of kind "pigeon" can be made; known here: shared-memory, process-'):
        carrier("pigeon")


def test_a_process_says_where_it_is_and_what_it_cannot_have(monkeypatch: pytest.MonkeyPatch):
    here = own_locality()
    assert here.machine == shared_memory.this_machine() and here.device == "cpu"
    monkeypatch.setattr(shared_memory.native_ring, "unavailable_reason", lambda: "no compiler was there")
    assert own_locality().unable == {"shared-memory": "no compiler was there"}

    def not_said() -> str:
        raise OSError("no /proc")

    for module in (shared_memory, registry):
        monkeypatch.setattr(module, "this_machine", not_said)
    here = own_locality()
    assert here.machine == ""
    assert here.unable == {"shared-memory": "this system does not say which machine it is (no /proc)"}
    assert choose_link("auto", here, here)[0] == "process-group"


# --- a further kind -------------------------------------------------------------------------------


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines that make the toy a kind like any other."""
    monkeypatch.setitem(CARRIERS, KIND, Sockets())
    monkeypatch.setattr(link_choice, "RULES", (*RULES, RULE))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # what a worker sets for its process


def test_before_it_is_in_the_table_the_manifest_refuses_it():
    with pytest.raises(ManifestError, match=r"links\.kind is 'socket': must be 'auto', 'shared-memory' or 'process-gr"):
        parse_manifest({"links": {"kind": KIND}})


def test_a_further_kind_serves_a_shard_and_a_group(sockets: None):
    """Tokens are those of the engine in one process, also after the link has been lost and made anew."""
    here = own_locality()
    wanted = parse_manifest({"links": {"kind": KIND}}).links.kind
    kind, reason = choose_link(wanted, here, here)
    assert (kind, reason) == (KIND, "the manifest says so")

    async def act(workers: Workers) -> None:
        shard, group = workers.shard, workers.group
        assert (await shard.status())["links"] == {"expert-0": KIND}
        assert (await group.status())["links"] == {"attention-0": KIND}
        shard._links["expert-0"]._connection.close()  # type: ignore[attr-defined]  # as by a reset
        version, failed = await shard.failed_links(-1)
        await shard.submit("replica", [REQUEST], [])
        _, failed = await shard.failed_links(version)
        assert list(failed) == ["expert-0"]
        await workers.link()
        assert await workers.finished() == alone(REQUEST)
        assert group.server.counts.messages >= len(alone(REQUEST))  # by the loop in Python, a message per MoE layer
        assert group.loop is None or group.loop.counts.messages == 0

    play(kind, act)


def test_a_further_kind_touches_three_files_of_the_product():
    """The carrier; its line in actors/links/registry.py; its line in cluster/control/link_choice.py. Nothing else in
    the product names a kind."""
    root = Path(registry.__file__).resolve().parents[2]
    named = {
        str(path.relative_to(root))
        for folder in ("actors", "cluster")
        for path in (root / folder).rglob("*.py")
        if any(f'"{kind}"' in path.read_text() for kind in CARRIERS)
    }
    assert named == {"actors/links/registry.py", "actors/links/shared_memory.py", "cluster/control/link_choice.py"}
