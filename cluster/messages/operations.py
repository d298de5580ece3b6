"""Scaling as transactions: what was asked for, how far it is, how it ended. Pure: no Ray and no I/O; times are given.

An operation has an absolute target, so that asking twice asks for the same thing. One runs at a time; its phases are
planned → preparing → committing → done, or rolling_back → rolled_back, or failed (also the roll-back failed). While one
waits for resources it is planned, and changes of copies overtake it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isotherm.cluster.errors import IsothermError
from isotherm.cluster.jsontypes import JSON

# Operations of each origin that are remembered: the autoscaler's push nobody else's out.
HISTORY = 200
AutoscalerMode = Literal["off", "advise", "on"]
Origin = Literal["api", "autoscaler", "recovery"]  # whose operation it is
OPERATOR: Origin = "api"
AUTOSCALER: Origin = "autoscaler"
RECOVERY: Origin = "recovery"  # it replaces the dead


class OperationError(IsothermError, ValueError):
    """The operation cannot be taken. `field` names what is wrong; `conflict` says that another one runs."""

    def __init__(self, message: str, field: str = "", conflict: bool = False):
        super().__init__(message)
        self.field, self.conflict = field, conflict


class Phase(str, Enum):
    PLANNED = "planned"
    PREPARING = "preparing"
    COMMITTING = "committing"
    DONE = "done"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (Phase.DONE, Phase.ROLLED_BACK, Phase.FAILED)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CopyTarget(_Model):
    """How many groups are to hold one expert; a number that is given stays until another is. None: as many as the
    autoscaler decides, again."""

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    count: int | None = Field(ge=1)


class Target(_Model):
    """What is to be; a field that is absent stays as it is."""

    expert_groups: int | None = Field(None, ge=1, le=4096)
    attention_shards: int | None = Field(None, ge=1, le=1024)
    copies: list[CopyTarget] = Field([], max_length=100_000)
    # Ray's ids of all nodes that are to have no worker of ours; an empty list: every node may have some.
    drain_nodes: list[str] | None = None
    model: str | None = None  # directory of the checkpoint that is to be served in the place of the one that is
    manifest: dict[str, Any] | None = None  # as its file says: what it has for workers is to be the new ones' values

    @property
    def rolls(self) -> bool:
        """Whether other workers are to take the place of those that serve, with another model or other values."""
        return self.model is not None or self.manifest is not None

    @property
    def about_workers(self) -> bool:
        """Not copies alone."""
        of_workers = self.expert_groups, self.attention_shards, self.drain_nodes
        return self.rolls or any(value is not None for value in of_workers)

    @property
    def is_empty(self) -> bool:
        return not self.about_workers and not self.copies


@dataclass(frozen=True)
class OperationRequest:
    """A checked body of POST /admin/operations."""

    target: Target
    idempotency_key: str
    dry_run: bool
    deadline_seconds: float


class _Body(Target):
    """What a client may write is narrower in two fields."""

    drain_nodes: list[Annotated[str, Field(pattern="^[0-9a-f]{1,64}$")]] | None = Field(None, max_length=4096)
    model: str | None = Field(None, pattern="^/", max_length=4096)
    idempotency_key: str = Field("", max_length=200)
    dry_run: bool = False
    deadline_seconds: float = Field(120.0, gt=0, le=86400, strict=False)


_PATTERNS = {
    "drain_nodes": "`isotherm status` shows the IDs of nodes",
    "model": "it must be a checkpoint's absolute path on the cluster's machines",
}


def parse_operation(body: Any) -> OperationRequest:
    """Check a decoded JSON body. Raises OperationError naming the first bad field."""
    try:
        parsed = _Body.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        known = f"; known: {', '.join(_Body.model_fields)}" if first["type"] == "extra_forbidden" else ""
        if first["type"] == "string_pattern_mismatch":
            known = f", got {str(first['input'])[:80]!r}; {_PATTERNS[str(first['loc'][0])]}"
        raise OperationError(f"{where}: {first['msg']}{known}", where) from None
    counts = Counter((copy.layer, copy.expert) for copy in parsed.copies)
    if twice := [pair for pair, count in counts.items() if count > 1]:
        layer, expert = twice[0]
        raise OperationError(f"copies: layer {layer} expert {expert} stands there more than once", "copies")
    target = Target.model_validate(parsed.model_dump(include=set(Target.model_fields)))
    if target.is_empty:
        raise OperationError(f"give at least one of {', '.join(Target.model_fields)}", "body")
    if target.rolls and (target.copies or target.drain_nodes is not None):
        field = "manifest" if target.model is None else "model"
        raise OperationError(f"{field}: copies and nodes are changed before it or afterwards, not with it", field)
    return OperationRequest(target, parsed.idempotency_key, parsed.dry_run, parsed.deadline_seconds)


class _ModeBody(_Model):
    mode: AutoscalerMode


def parse_mode(body: Any) -> AutoscalerMode:
    """Check the decoded body of POST /admin/autoscaler. Raises OperationError."""
    try:
        return _ModeBody.model_validate(body).mode
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise OperationError(
            f'{where}: {first["msg"]}; the body is {{"mode": "off"}}, "advise" or "on"', where
        ) from None


@dataclass
class Operation:
    """One operation's record. Times are seconds since the epoch."""

    id: str
    target: JSON
    origin: Origin
    created: float
    idempotency_key: str = ""
    dry_run: bool = False
    phase: Phase = Phase.PLANNED
    waiting: bool = False  # for resources, before it takes its turn
    committed: bool = False  # every shard routes by it, and it is written down
    progress: float = 0.0
    plan: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    entered: dict[str, float] = field(default_factory=dict)  # phase → when

    @property
    def finishes(self) -> bool:
        """Other workers have taken over; what is left is that streams end on those that they began on."""
        return self.committed and bool({"model", "manifest"} & self.target.keys()) and not self.phase.is_final

    def enter(self, phase: Phase, now: float, reason: str = "") -> None:
        """Go on to a phase. Raises OperationError where the operation has ended."""
        if self.phase.is_final:
            raise OperationError(f"operation {self.id} has ended: {self.phase.value}")
        self.phase, self.waiting = phase, False
        self.entered[phase.value] = now
        if phase is Phase.DONE:
            self.progress = 1.0
        if reason:
            self.reasons.append(reason)

    def as_dict(self) -> JSON:
        """What GET /admin/operations/{id} gives; `seconds` is how long each phase took that has ended."""
        times = sorted(self.entered.items(), key=lambda item: item[1])
        ends = [when for _, when in times[1:]]
        return {
            "id": self.id,
            "phase": self.phase.value,
            "target": self.target,
            "origin": self.origin,
            "dry_run": self.dry_run,
            "idempotency_key": self.idempotency_key,
            "progress": round(self.progress, 4),
            "plan": self.plan,
            "reasons": self.reasons,
            "created": self.created,
            "seconds": {name: round(end - when, 3) for (name, when), end in zip(times, ends, strict=False)},
            "entered": self.entered,
        }


class OperationLog:
    """The operations of a cluster, newest last, and which key belongs to which."""

    def __init__(self) -> None:
        self._operations: dict[str, Operation] = {}
        self._count = 0
        self._forgotten: Counter[tuple[str, str]] = Counter()  # (origin, phase) of those that are not remembered

    def open(self, request: OperationRequest, now: float, origin: Origin = OPERATOR) -> tuple[Operation, bool]:
        """The operation for a request, and whether it is new. The same key again gives the operation that it had
        before. Raises OperationError (conflict) while another one runs, or waits for resources and both are about
        workers."""
        if (known := self.known(request)) is not None:
            return known, False
        target = _target_of(request)
        if not request.dry_run:
            self._refuse_beside_others(request, origin)
        self._count += 1
        operation = Operation(f"op-{self._count}", target, origin, now, request.idempotency_key, request.dry_run)
        operation.entered[Phase.PLANNED.value] = now
        self.record(operation)
        return operation, True

    def known(self, request: OperationRequest) -> Operation | None:
        """The one that the request's key had before. Dry runs have keys of their own: what was only looked at can still
        be done. Raises OperationError where the key was used for something else."""
        if not request.idempotency_key:
            return None
        for operation in self._operations.values():
            if operation.idempotency_key == request.idempotency_key and operation.dry_run == request.dry_run:
                if operation.target != _target_of(request):
                    raise OperationError(
                        f"idempotency_key {request.idempotency_key!r} was used for another target",
                        "idempotency_key",
                    )
                return operation
        return None

    def _refuse_beside_others(self, request: OperationRequest, origin: Origin) -> None:
        for other in self._running():
            if origin != AUTOSCALER and other.origin == AUTOSCALER:
                continue  # it does not stand in an operator's way: theirs comes next, or in its place
            if other.finishes and not request.target.rolls and request.target.drain_nodes is None:
                continue  # it has nothing to do with the workers that serve now
            if other.finishes:
                raise OperationError(
                    f"operation {other.id} is committed, and streams finish on the workers that it replaces; "
                    "until they are gone no other model and no other values come, and no node is drained",
                    conflict=True,
                )
            if not other.waiting:
                raise OperationError(f"operation {other.id} is {other.phase.value}; one runs at a time", conflict=True)
            if request.target.about_workers:
                raise OperationError(
                    f"operation {other.id} waits for resources; until it ends only copies can be changed", conflict=True
                )

    def record(self, operation: Operation) -> None:
        """Remember an operation, also one that nobody asked for: a recovery. The oldest of its origin that have ended
        are forgotten."""
        self._operations[operation.id] = operation
        mine = [o for o in self._operations.values() if o.origin == operation.origin]
        for old in [o.id for o in mine if o.phase.is_final][: max(0, len(mine) - HISTORY)]:
            if not (forgotten := self._operations.pop(old)).dry_run:
                self._forgotten[_outcome(forgotten)] += 1

    def running(self) -> Operation | None:
        """The one that others wait for."""
        return next((o for o in self._running() if not o.waiting and not o.finishes), None)

    def waiting(self) -> Operation | None:
        """The one that waits for resources."""
        return next((o for o in self._running() if o.waiting), None)

    def finishing(self) -> Operation | None:
        """The one after which streams still end on the workers that they began on."""
        return next((o for o in self._running() if o.finishes), None)

    def under_way(self) -> Operation | None:
        """The one to be shown."""
        return self.running() or self.waiting() or self.finishing()

    def _running(self) -> Iterator[Operation]:
        return (o for o in self._operations.values() if not o.phase.is_final and not o.dry_run)

    def get(self, operation_id: str) -> Operation | None:
        return self._operations.get(operation_id)

    def all(self) -> list[Operation]:
        return list(self._operations.values())

    def ended(self) -> dict[tuple[str, str], int]:
        """How many have ended how, ever: (origin, phase) → count. Dry runs do not count."""
        remembered = [o for o in self._operations.values() if o.phase.is_final and not o.dry_run]
        return dict(self._forgotten + Counter(map(_outcome, remembered)))

    def open_count(self) -> int:
        return sum(1 for _ in self._running())

    def dump(self) -> str:
        """Everything as JSON, for a controller that comes back."""
        records = [o.__dict__ | {"phase": o.phase.value} for o in self._operations.values()]
        forgotten = [[*outcome, count] for outcome, count in self._forgotten.items()]
        return json.dumps({"count": self._count, "operations": records, "forgotten": forgotten})

    @staticmethod
    def load(text: str, now: float) -> OperationLog:
        """What `dump` wrote. Operations that were under way ended with the controller: those that were committed are
        done, for what was left of them is freed by the one that comes back; the others are rolled back. One that
        `finishes` goes on to."""
        log = OperationLog()
        data: Mapping[str, Any] = json.loads(text)
        log._count = data["count"]
        log._forgotten.update({(origin, phase): count for origin, phase, count in data["forgotten"]})
        for record in data["operations"]:
            operation = Operation(**record | {"phase": Phase(record["phase"])})
            if not operation.phase.is_final and not operation.finishes:
                operation.enter(
                    Phase.DONE if operation.committed else Phase.ROLLED_BACK, now, "the controller was restarted"
                )
            log._operations[operation.id] = operation
        return log


def _target_of(request: OperationRequest) -> JSON:
    """What is asked for. Within `copies` None means something."""
    target = request.target.model_dump(exclude_defaults=True)
    return {name: value for name, value in target.items() if value is not None}


def summed_up(waits: Sequence[str]) -> str:
    """What an operation waits for, in a line however much it is: the first of it, and how many more there are."""
    return "; ".join([*waits[:1], *([f"{len(waits) - 1} more wait too"] if len(waits) > 1 else [])])


def _outcome(operation: Operation) -> tuple[str, str]:
    return operation.origin, operation.phase.value


class PlacementChangeError(IsothermError, ValueError):
    """The change cannot be made with these groups and slots."""
