"""What the bits of a token depend on beside prompt, parameters and seed: one fingerprint for a cluster, and who may
join it. Pure."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, astuple, dataclass, fields

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON


class NumericsError(IsothermError, RuntimeError):
    """A worker would not compute the same bits as the others; names it, and what differs."""


@dataclass(frozen=True)
class Fingerprint:
    """Workers that agree in all of this compute the same bits from the same rows."""

    weights: str  # Checkpoint.digest()
    dtype: str  # of activations and KV cache
    kept: str  # in how many bits: WeightChoice.kept
    device: str  # cpu | cuda
    kernels: str  # native | reference | triton
    summation: int  # version of the order in which these kernels add up
    instructions: str  # amx_bf16, avx512_bf16, avx2, …; sm_90

    @property
    def digest(self) -> str:
        """`system_fingerprint` of what one such worker, or any number of them, computes."""
        return _digest([self])


# What a worker on a GPU and one on a CPU must share; which of them computes what is the manifest's choice, and stays.
SHARED = ("weights", "dtype", "kept")
WORDS = {
    "weights": "weights",
    "dtype": "dtype",
    "kept": "weights kept as",
    "kernels": "kernels",
    "summation": "summation order",
    "instructions": "instruction set",
}


def _digest(fingerprints: list[Fingerprint]) -> str:
    text = json.dumps(sorted(astuple(f) for f in fingerprints))
    return f"isotherm-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


class ClusterNumerics:
    """The fingerprint of a cluster: that of the first worker on each kind of device. Others must agree with it, unless
    `mixed` is "allow"."""

    def __init__(self, mixed: str):
        self.mixed = mixed  # refuse | allow
        self._first: dict[str, Fingerprint] = {}  # device → its first worker's
        self._others: set[Fingerprint] = set()  # only where mixed ones are allowed

    def admit(self, worker: str, found: Fingerprint) -> None:
        """A worker that has just been started. Raises NumericsError for one that may not serve here."""
        if differences := self._differences(found):
            if self.mixed != "allow":
                raise NumericsError(
                    f"{worker} is refused, since it would compute other bits than this cluster: "
                    f"{'; '.join(differences)}. Keep workers on nodes that are alike (attention.labels, "
                    "experts.labels), with the same files and an isa that all of them have, or set mixed: allow"
                )
            self._others.add(found)
        else:
            self._first.setdefault(found.device, found)

    def _differences(self, found: Fingerprint) -> list[str]:
        for device, first in self._first.items():
            names = WORDS if device == found.device else SHARED
            if differing := [name for name in names if getattr(found, name) != getattr(first, name)]:
                return [f"{WORDS[name]} {getattr(found, name)}, not {getattr(first, name)}" for name in differing]
        return []

    @property
    def system_fingerprint(self) -> str:
        """Of replies; empty before the first worker has come."""
        known = [*self._first.values(), *self._others]
        return _digest(known) + ("-mixed" if self._others else "") if known else ""

    def as_dict(self) -> JSON:
        """What `isotherm status` shows."""
        return {
            "system_fingerprint": self.system_fingerprint,
            "mixed": self.mixed,
            "numerics": [asdict(f) for f in self._known()],
        }

    def _known(self) -> list[Fingerprint]:
        return [*self._first.values(), *sorted(self._others, key=astuple)]

    def dump(self) -> str:
        """For `restore`, in a controller that comes back: what held goes on to hold, also where no worker is left to
        ask."""
        return json.dumps([asdict(f) for f in self._known()]) if self._first else ""

    def restore(self, dumped: str) -> None:
        names = {field.name for field in fields(Fingerprint)}
        for values in json.loads(dumped or "[]"):
            if not names <= values.keys():
                continue  # of an earlier release, which could not say all that counts now
            found = Fingerprint(**{name: values[name] for name in names})
            if self._differences(found):
                self._others.add(found)
            else:
                self._first.setdefault(found.device, found)
