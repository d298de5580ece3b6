"""The placement policy against EPLB on seeded load traces: `python tests/bench_elastic/policy.py [--seeds 5]` prints
the table.

A trace is rows per (window, layer, expert). Hotness is log-normal over experts and drifts: each window, log-loads take
one AR(1) step, and about one expert in a hundred jumps, as when the traffic changes subject.

Protocol, the same for every case and seed: the copies begin as the contiguous placement (one copy each). At the end of
each of windows 0..10 the policy sees the rows up to and including that window and places for the next, which comes and
is scored. Imbalance is the mean over layers of (hottest group / mean group), and of that over the 11 placements. Moves
are copies newly loaded as a fraction of all copies; the mean over the 10 placements after the first, as in the
reference figures, and over all 11, the first one being out of the contiguous placement. EPLB, as tests/helpers/eplb.py
writes it anew from its description, is run on the same trace, and sees the last window. `plan` is the time of the
slowest of the 11 plans, on one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import eplb

from isotherm.cluster.autoscale.forecast import predict
from isotherm.cluster.placement.policy import Group, rebalance
from isotherm.cluster.placement.table import Placement, contiguous_placement

LAYERS, EXPERTS, WINDOWS = 58, 256, 12


@dataclass(frozen=True)
class Case:
    """`eplb_*` are the project's reference figures: what DeepSeek's EPLB reaches on seed 0 of the trace when it
    rebalances every window by the window just seen, moves after the first placement. Where there are 32 groups, it is
    in its hierarchical form, with 8 to a node."""

    number: int  # seeds the trace together with its seed
    groups: int
    slots: int  # per group and layer
    sigma: float  # of log-load
    drift: float  # per window
    nodes: int  # of EPLB; 1: its global form
    eplb_imbalance: float
    eplb_moves: float
    contiguous_imbalance: float  # with no rebalancing


CASES = {
    "prefill-ep32": Case(1, 32, 9, 1.0, 0.15, 4, 1.47, 0.888, 2.712),
    "decode-ep144": Case(0, 144, 2, 1.0, 0.15, 1, 2.832, 0.955, 8.124),
    "skewed-ep32": Case(3, 32, 9, 1.6, 0.15, 4, 2.119, 0.863, 6.345),
    "shifting-ep32": Case(2, 32, 9, 1.0, 0.45, 4, 1.657, 0.931, 2.554),
}
BLOCKS = 8  # of neighbouring experts that hierarchical EPLB keeps on one node


def trace(case: Case, seed: int, windows: int = WINDOWS, layers: int = LAYERS, experts: int = EXPERTS) -> np.ndarray:
    """Rows per (window, layer, expert), float64 [W, L, E]; every layer of a window sums to 1e6."""
    rng = np.random.default_rng([seed, case.number])
    log_LE = rng.normal(0.0, case.sigma, (layers, experts))
    rows_WLE = np.empty((windows, layers, experts))
    for window in range(windows):
        heat_LE = np.exp(log_LE)
        rows_WLE[window] = heat_LE / heat_LE.sum(axis=1, keepdims=True) * 1e6
        log_LE = np.sqrt(1 - case.drift**2) * log_LE + case.drift * rng.normal(0.0, case.sigma, (layers, experts))
        jump_LE = rng.random((layers, experts)) < 0.01
        log_LE = np.where(jump_LE, rng.normal(0.0, 1.5 * case.sigma, (layers, experts)), log_LE)
    return rows_WLE


def imbalance(rows_LE: np.ndarray, holds_LEG: np.ndarray) -> float:
    """Mean over layers of (hottest group / mean group), a replicated expert's rows split evenly over its copies."""
    copies_LE1 = holds_LEG.sum(axis=2, keepdims=True)
    if not copies_LE1.all():
        raise ValueError("some expert has no copy")
    group_LG = (rows_LE[:, :, None] * holds_LEG / copies_LE1).sum(axis=1)
    return float((group_LG.max(axis=1) / group_LG.mean(axis=1)).mean())


def moves(holds_LEG: np.ndarray, before_LEG: np.ndarray) -> float:
    """Copies newly loaded, as a fraction of all copies."""
    return float((holds_LEG & ~before_LEG).sum() / holds_LEG.sum())


def holds(placement: Placement, groups: Sequence[Group]) -> np.ndarray:
    """bool [L, E, G]: which groups hold a copy."""
    number = {group.name: g for g, group in enumerate(groups)}
    holds_LEG = np.zeros((len(placement.layers), len(placement.holders[0]), len(groups)), dtype=bool)
    for i, row in enumerate(placement.holders):
        for e, held in enumerate(row):
            holds_LEG[i, e, [number[g] for g in held]] = True
    return holds_LEG


@dataclass(frozen=True)
class Score:
    imbalance: float
    moves: float  # after the first placement
    moves_with_first: float
    slowest_plan: float  # seconds


def score(case: Case, seed: int, windows: int = WINDOWS, layers: int = LAYERS) -> Score:
    """Run the policy, as it is by default, over one trace. Raises AssertionError where a group has more copies in a
    layer than slots."""
    groups = [Group(f"group-{g:03}", slots_per_layer=case.slots) for g in range(case.groups)]
    placement = contiguous_placement(range(layers), EXPERTS, [group.name for group in groups])

    def place(seen_WLE: np.ndarray) -> np.ndarray:
        nonlocal placement
        placement = rebalance(placement, groups, predict(seen_WLE)).placement
        return holds(placement, groups)

    return _score(case, trace(case, seed, windows, layers), place)


def eplb_score(case: Case, seed: int, windows: int = WINDOWS, layers: int = LAYERS) -> Score:
    """The same of EPLB."""
    blocks = BLOCKS if case.nodes > 1 else 1
    rows_WLE = trace(case, seed, windows, layers)
    return _score(
        case, rows_WLE, lambda seen_WLE: eplb.place(seen_WLE[-1], case.groups, case.slots, case.nodes, blocks)
    )


def _score(case: Case, rows_WLE: np.ndarray, place: Callable[[np.ndarray], np.ndarray]) -> Score:
    """`place`: from the windows seen so far to who holds a copy."""
    groups = [Group(f"group-{g:03}") for g in range(case.groups)]
    before_LEG = holds(
        contiguous_placement(range(rows_WLE.shape[1]), EXPERTS, [group.name for group in groups]), groups
    )
    imbalances, loaded, seconds = [], [], []
    for window in range(len(rows_WLE) - 1):
        begin = time.perf_counter()
        now_LEG = place(rows_WLE[: window + 1])
        seconds.append(time.perf_counter() - begin)
        assert (now_LEG.sum(axis=1) <= case.slots).all()
        imbalances.append(imbalance(rows_WLE[window + 1], now_LEG))
        loaded.append(moves(now_LEG, before_LEG))
        before_LEG = now_LEG
    return Score(float(np.mean(imbalances)), float(np.mean(loaded[1:])), float(np.mean(loaded)), max(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="the reference figures are of seed 0")
    arguments = parser.parse_args()
    print(
        f"{'':14} {'seed':>4}   {'imbalance':>9} {'EPLB':>6} {'reference':>9} {'contiguous':>10}   "
        f"{'moves':>6} {'EPLB / 10':>9} {'reference':>9} {'with first':>10}   {'plan':>7}"
    )
    for seed in range(arguments.seeds):
        for name, case in CASES.items():
            ours, theirs = score(case, seed), eplb_score(case, seed)
            even = f"{case.eplb_imbalance:9.3f} {case.contiguous_imbalance:10.3f}" if seed == 0 else " " * 20
            limit = f"{case.eplb_moves / 10:9.4f}" if seed == 0 else " " * 9
            print(
                f"{name:14} {seed:4}   {ours.imbalance:9.3f} {theirs.imbalance:6.3f} {even}   {ours.moves:6.4f} "
                f"{theirs.moves / 10:9.4f} {limit} {ours.moves_with_first:10.4f}   {ours.slowest_plan:5.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
