"""The kinds of links there are, and what this process says of where it is, by which one is chosen
(cluster/control/link_choice.py)."""

from __future__ import annotations

from contextlib import suppress

from isotherm.actors.links.process_group import ProcessGroups
from isotherm.actors.links.protocol import Carrier, LinkError
from isotherm.actors.links.shared_memory import SharedMemory, this_machine
from isotherm.cluster.messages.workers import Locality

_ALL: tuple[Carrier, ...] = (
    SharedMemory(),
    ProcessGroups("process-group-nccl", lane=True),
    ProcessGroups("process-group", lane=False),
)
CARRIERS: dict[str, Carrier] = {carrier.kind: carrier for carrier in _ALL}


def carrier(kind: str) -> Carrier:
    """Raises LinkError for a kind that this version does not know."""
    try:
        return CARRIERS[kind]
    except KeyError:
        raise LinkError(f'no link of kind "{kind}" can be made; known here: {", ".join(CARRIERS)}') from None


def own_locality() -> Locality:
    """Of a process whose rows are on the CPU."""
    machine = ""
    with suppress(OSError):
        machine = this_machine()
    reasons = {kind: carrier.unavailable_reason() for kind, carrier in CARRIERS.items()}
    return Locality(machine, {kind: reason for kind, reason in reasons.items() if reason is not None})
