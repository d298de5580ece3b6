"""Which copies of experts to add, move and drop, decided from the expected load. Pure: placement, slots and rows in, a
plan out.

`rebalance` makes a plan: steps that, carried out in order, never leave an expert without a copy, and the placement that
they lead to. Which steps is found in cluster/placement/search.py. A copy is loaded, committed, and only then another
one freed, so while steps are carried out some groups hold more than in the end: `stages` cuts a plan into runs that
fit. Nothing here knows of workers, versions in flight or time.

Shape suffixes: L MoE layers, E experts, G groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from isotherm.cluster.placement.search import Change, Slots, group_heat, search
from isotherm.cluster.placement.table import Placement

NO_LIMIT = 1 << 40  # slots
LEAST_LOADS = 16  # one plan may load so many copies in the smallest model too
SMALL_LAYER = 64  # copies; in a layer with fewer a load costs no larger part of PolicyConfig.move_cost


@dataclass(frozen=True)
class Group:
    """One expert group and its room: slots over all layers, or in each layer, or both; None: no limit. Groups whose
    `node` is the same share one."""

    name: str
    node: str = ""
    slots: int | None = None
    slots_per_layer: int | None = None


@dataclass(frozen=True)
class PolicyConfig:
    """When a plan is made, and how much it may cost. The imbalance of a layer is its hottest group's rows / the mean
    group's."""

    # What loading as many copies as a layer holds must take off its imbalance, at least; each load its part of that
    move_cost: float = 0.2
    tolerance: float = 1.05  # a layer whose imbalance is no more than this is left alone
    noise: float = 3.0  # ... or no more than this many standard deviations of counting above 1
    max_moves: float = 0.4  # copies loaded by one plan, as a fraction of all copies; LEAST_LOADS are always allowed

    def __post_init__(self) -> None:
        for name, least in (("move_cost", 0.0), ("tolerance", 1.0), ("noise", 0.0), ("max_moves", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least:g}")


@dataclass(frozen=True)
class Step:
    """Add (no source), move, or drop (no target) a copy. A move adds at the target, then drops at the source."""

    layer: int  # as in Placement.layers
    expert: int
    source: str | None
    target: str | None


@dataclass(frozen=True)
class Plan:
    """`placement` is what the steps lead to, with the next version; the old one if there are none. The figures are of
    the rows it was made for."""

    steps: tuple[Step, ...]
    placement: Placement
    imbalance_before: float  # mean over layers
    imbalance_after: float
    heat_before: float  # hottest group / mean group, rows of all layers together
    heat_after: float
    reason: str

    @property
    def loads(self) -> int:
        """Copies that have to be loaded."""
        return sum(step.target is not None for step in self.steps)


def rebalance(
    placement: Placement,
    groups: Sequence[Group],
    rows_LE: np.ndarray,
    config: PolicyConfig = PolicyConfig(),
    *,
    max_loads: int | None = None,
    pinned: Collection[tuple[int, int]] = (),
) -> Plan:
    """Even out the rows [L, E] that are expected next (`predict` in cluster/autoscale/forecast.py) with few loads; no
    steps where that does not pay, and `reason` says why.

    `max_loads` caps the copies loaded, in place of `config.max_moves`. The number of copies of a `pinned` (layer,
    expert) is left as it is. Raises ValueError where the rows' shape is wrong or the placement names a group that is
    not given.
    """
    numbers = _numbered(placement, groups)
    holds_LEG = _holds(placement, numbers)
    rows_LE = _checked(rows_LE, holds_LEG.shape[:2])
    layers = _uneven_layers(rows_LE, holds_LEG, config)
    if not len(layers):
        return _plan(placement, (), rows_LE, numbers, _why_none(rows_LE, holds_LEG))
    pinned_LE = np.zeros(rows_LE.shape, dtype=bool)
    for layer, expert in pinned:
        pinned_LE[placement.layers.index(layer), expert] = True
    copies = int(holds_LEG.sum())
    changes = search(
        holds_LEG,
        _relative(rows_LE, len(groups)),
        Slots(_limits([g.slots_per_layer for g in groups]), _limits([g.slots for g in groups])),
        np.unique([g.node for g in groups], return_inverse=True)[1],
        pinned_LE,
        layers=layers.tolist(),
        least_rate=config.move_cost / max(SMALL_LAYER, copies / len(placement.layers)),
        max_loads=max(LEAST_LOADS, int(config.max_moves * copies)) if max_loads is None else max_loads,
    )
    steps = tuple(_step(placement, groups, layer, change) for layer, change in changes)
    uneven = f"{len(layers)} of {len(rows_LE)} layers are uneven"
    return _plan(
        placement, steps, rows_LE, numbers, uneven if steps else f"{uneven}, but no change saves what its loads cost"
    )


def replay(placement: Placement, steps: Sequence[Step]) -> Placement:
    """The placement after the steps, with the next version if there are any. Raises ValueError at a step that does not
    fit what it is applied to."""
    row_of = {layer: i for i, layer in enumerate(placement.layers)}
    holders = [list(row) for row in placement.holders]
    for step in steps:
        row = holders[row_of[step.layer]]
        held = row[step.expert]
        if step.target in held or (step.source is not None and step.source not in held):
            raise ValueError(f"{step}: the expert is held by {list(held)}")
        added = held if step.target is None else (*held, step.target)
        row[step.expert] = tuple(g for g in added if g != step.source)
    return replace(placement, version=placement.version + bool(steps), holders=tuple(map(tuple, holders)))


def stages(placement: Placement, groups: Sequence[Group], steps: Sequence[Step]) -> Iterator[tuple[Step, ...]]:
    """Cut the steps into runs, each to be prepared, committed and freed as one: all its copies are loaded before any is
    dropped.

    The groups' slots are here what they can hold meanwhile. Two groups that are both full exchange through one slot
    more in the one that the first step of the exchange loads; so give every group at least one more than `rebalance`
    was given. Raises ValueError at a step that has no room even alone.
    """
    numbers = _numbered(placement, groups)
    row_of = {layer: i for i, layer in enumerate(placement.layers)}
    most_G, most_in_layer_G = _limits([g.slots for g in groups]), _limits([g.slots_per_layer for g in groups])
    used_LG = _holds(placement, numbers).sum(axis=1)
    used_G = used_LG.sum(axis=0)
    run: list[Step] = []

    def fits(layer: int, g: int) -> bool:
        return bool(used_G[g] < most_G[g] and used_LG[layer, g] < most_in_layer_G[g])

    def free(done: Sequence[Step]) -> None:
        for step in done:
            if step.source is not None:
                used_LG[row_of[step.layer], numbers[step.source]] -= 1
                used_G[numbers[step.source]] -= 1

    for step in steps:
        if step.target is not None:
            layer, g = row_of[step.layer], numbers[step.target]
            if run and not fits(layer, g):
                yield tuple(run)
                free(run)
                run = []
            if not fits(layer, g):
                raise ValueError(
                    f"{step}: no slot for it; the group holds {used_G[g]} copies, "
                    f"{used_LG[layer, g]} of them in this layer"
                )
            used_LG[layer, g] += 1
            used_G[g] += 1
        run.append(step)
    if run:
        yield tuple(run)


# --- from names to arrays and back ----------------------------------------------------------------


def _numbered(placement: Placement, groups: Sequence[Group]) -> dict[str, int]:
    numbers = {group.name: i for i, group in enumerate(groups)}
    if len(numbers) < len(groups):
        raise ValueError(f"groups {[g.name for g in groups]} must have distinct names")
    unknown = [name for name in placement.groups() if name not in numbers]
    if unknown:
        raise ValueError(f"the placement names groups {unknown}; known are {list(numbers)}")
    return numbers


def _holds(placement: Placement, numbers: dict[str, int]) -> np.ndarray:
    """bool [L, E, G]: which groups hold a copy."""
    sizes = {len(row) for row in placement.holders}
    if len(sizes) > 1:
        raise ValueError(f"layers with {sorted(sizes)} experts; every layer must have the same number")
    holds_LEG = np.zeros((len(placement.layers), max(sizes, default=0), len(numbers)), dtype=bool)
    at = [(i, e, numbers[g]) for i, row in enumerate(placement.holders) for e, held in enumerate(row) for g in held]
    holds_LEG[tuple(np.array(at, dtype=np.int64).reshape(-1, 3).T)] = True
    return holds_LEG


def _checked(rows_LE: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows_LE = np.asarray(rows_LE, dtype=np.float64)
    if rows_LE.shape != shape or not (np.isfinite(rows_LE).all() and (rows_LE >= 0).all()):
        raise ValueError(f"rows of shape {rows_LE.shape} must be finite, at least 0, and of shape {shape}")
    return rows_LE


def _limits(slots: Sequence[int | None]) -> np.ndarray:
    return np.array([NO_LIMIT if n is None else n for n in slots], dtype=np.int64)


def _step(placement: Placement, groups: Sequence[Group], layer: int, change: Change) -> Step:
    source, target = (groups[g].name if g >= 0 else None for g in (change.source, change.target))
    return Step(placement.layers[layer], change.expert, source, target)


# --- figures --------------------------------------------------------------------------------------


def _relative(rows_LE: np.ndarray, groups: int) -> np.ndarray:
    """In units of the layer's mean group; 0 in a layer without rows."""
    relative_LE: np.ndarray = rows_LE * groups / np.maximum(rows_LE.sum(axis=1, keepdims=True), 1e-300)
    return relative_LE


def _imbalance(heat_LG: np.ndarray) -> np.ndarray:
    """Hottest group / mean group [L]; 1 in a layer without rows."""
    mean_L = heat_LG.mean(axis=1)
    imbalance_L: np.ndarray = np.divide(heat_LG.max(axis=1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)
    return imbalance_L


def _heat(heat_LG: np.ndarray) -> float:
    """Of all layers together."""
    return float(_imbalance(heat_LG.sum(axis=0, keepdims=True))[0])


def _uneven_layers(rows_LE: np.ndarray, holds_LEG: np.ndarray, config: PolicyConfig) -> np.ndarray:
    """Numbers of the layers that are beyond tolerance, and by more than chance. n rows counted in a mean group have a
    relative standard deviation of 1/√n (Poisson)."""
    groups = holds_LEG.shape[2]
    if not holds_LEG.size or groups == 1:
        return np.empty(0, dtype=np.int64)
    mean_L = rows_LE.sum(axis=1) / groups
    limit_L = np.maximum(config.tolerance, 1 + config.noise / np.sqrt(np.maximum(mean_L, 1e-9)))
    return np.flatnonzero(_imbalance(group_heat(rows_LE, holds_LEG)) > limit_L)


def _why_none(rows_LE: np.ndarray, holds_LEG: np.ndarray) -> str:
    if not holds_LEG.size:
        return "there are no routed experts"
    if holds_LEG.shape[2] == 1:
        return "there is one group"
    return "every layer is within tolerance, or has too few rows to tell" if rows_LE.any() else "there are no rows"


def _plan(
    placement: Placement, steps: tuple[Step, ...], rows_LE: np.ndarray, numbers: dict[str, int], reason: str
) -> Plan:
    new = replay(placement, steps)
    if not rows_LE.size:
        return Plan(steps, new, 1.0, 1.0, 1.0, 1.0, reason)
    before_LG, after_LG = (group_heat(rows_LE, _holds(p, numbers)) for p in (placement, new))
    return Plan(
        steps,
        new,
        float(_imbalance(before_LG).mean()),
        float(_imbalance(after_LG).mean()),
        _heat(before_LG),
        _heat(after_LG),
        reason,
    )
