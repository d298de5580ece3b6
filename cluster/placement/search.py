"""The search behind cluster/placement/policy.py, on arrays: which copies of experts to load and drop so that the
groups' rows become even. Pure.

It is greedy. Each layer offers the change that takes most heat off one of its hottest groups for the copies that it
loads; the best offer of all layers is taken, that layer makes its next one, and so on until no offer is worth its loads
or the budget is spent. A change is

- a move of an expert to a cooler group with a free slot (one load),
- an exchange of two experts between two groups (two loads), or
- a further copy of the expert with the most rows per copy, in a free slot or in place of a copy of the replicated
  expert that misses it least (one load).

What a plan has loaded it does not move on, and what it has dropped it does not load back. So the changes, in the order
they were found, are steps that can be carried out one after the other, and every load is final.

Shape suffixes: L MoE layers, E experts, G groups, N nodes; in one layer, S the experts of a group and K the places that
one of them could go to.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

COPY_WEIGHT = 3.0  # of an expert's rows per copy beside a group's rows
HOTTEST = 8  # groups of a layer that are looked at for a change worth its loads, the hottest first
SHARED_NODE = 0.5  # a change that puts two copies of an expert on one node counts this much of its gain


class Change(NamedTuple):
    """Group -1 is none: a copy is added (no source), moved, or dropped (no target)."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class Offer:
    gain: float  # what it takes off the layer's unevenness
    changes: tuple[Change, ...]

    @property
    def loads(self) -> int:
        return sum(change.target >= 0 for change in self.changes)

    @property
    def rate(self) -> float:
        return self.gain / self.loads


def group_heat(load_LE: np.ndarray, holds_LEG: np.ndarray) -> np.ndarray:
    """Rows of each group [L, G], an expert's rows split evenly over its copies."""
    heat_LG: np.ndarray = np.einsum("le,leg->lg", load_LE / holds_LEG.sum(axis=2), holds_LEG, optimize=True)
    return heat_LG


# The mean that stands for the hottest group is of sixth powers: high enough to see it, low enough to see the next ones,
# which drift may make hottest.
def _power(x: np.ndarray) -> np.ndarray:
    """x⁶, multiplied out: numpy's own power takes longer."""
    cube: np.ndarray = x * x * x
    sixth: np.ndarray = cube * cube
    return sixth


def _root(x: np.ndarray | float) -> np.ndarray:
    """The sixth root; rounding may have made a 0 negative."""
    return np.maximum(x, 0.0) ** (1 / 6)


class LayerSearch:
    """One layer's copies as they are so far.

    Unevenness is the 6-norm of the groups' rows plus COPY_WEIGHT times that of the experts' rows per copy, over the
    norm of G even groups. The second makes it worthwhile to spread an expert that is hot by itself: no group can be
    cooler than one of its copies, and when its rows change, those of a whole group do.
    """

    def __init__(
        self, load_E: np.ndarray, holds_EG: np.ndarray, slots_G: np.ndarray, node_G: np.ndarray, pinned_E: np.ndarray
    ):
        """load_E: rows in units of a mean group's. slots_G: of this layer. pinned_E: experts whose number of copies
        stays."""
        self.load_E, self.slots_G, self.node_G, self.pinned_E = load_E, slots_G, node_G, pinned_E
        self.holds_EG = holds_EG.copy()
        self.settled_EG = np.zeros_like(holds_EG)  # loaded or dropped by this plan
        self.movable_EG = holds_EG.copy()  # held and not settled
        self.count_E = holds_EG.sum(axis=1)
        self.used_G = holds_EG.sum(axis=0)
        self.share_E = load_E / self.count_E
        self.heat_G = self.share_E @ holds_EG
        self.on_node_EN = np.stack([holds_EG[:, node_G == n].sum(axis=1) for n in range(node_G.max() + 1)], axis=1)

    def apply(self, changes: Iterable[Change]) -> None:
        for e, source, target in changes:
            self.heat_G -= self.holds_EG[e] * self.share_E[e]
            for g, held in ((source, False), (target, True)):
                if g >= 0:
                    self.holds_EG[e, g], self.settled_EG[e, g], self.movable_EG[e, g] = held, True, False
                    by = 1 if held else -1
                    self.used_G[g] += by
                    self.count_E[e] += by
                    self.on_node_EN[e, self.node_G[g]] += by
            self.share_E[e] = self.load_E[e] / self.count_E[e]
            self.heat_G += self.holds_EG[e] * self.share_E[e]

    def best_offer(self, room_G: np.ndarray, least_rate: float) -> Offer | None:
        """The best change with the slots that are left over all layers; None if none takes off `least_rate`
        per load."""
        self.free_G = (self.used_G < self.slots_G) & (room_G > 0)
        self.power_G, self.power_E = _power(self.heat_G), _power(self.share_E)
        self.movable_P = np.nonzero(self.movable_EG)
        self.sum_G, self.sum_E = float(self.power_G.sum()), float(self.power_E.sum())
        best = self._further_copy()
        for hot in np.argsort(-self.heat_G, kind="stable")[:HOTTEST].tolist():
            offer = self._move_or_exchange(hot)
            if offer is not None and (best is None or offer.rate > best.rate):
                best = offer
            if best is not None and best.rate >= least_rate:
                return best
        return None

    def _gain(self, groups_change: np.ndarray, experts_change: float = 0.0) -> np.ndarray:
        """What changes to the two sums of powers take off the unevenness."""
        gain: np.ndarray = _root(self.sum_G) - _root(self.sum_G + groups_change)
        if experts_change:
            gain = gain + COPY_WEIGHT * (_root(self.sum_E) - _root(self.sum_E + experts_change))
        gain /= _root(len(self.heat_G))
        return gain

    def _move_or_exchange(self, hot: int) -> Offer | None:
        """The best way to give one of the hot group's experts away: to a free slot of any group, or for any expert of
        another group."""
        groups = len(self.heat_G)
        mine_S = np.flatnonzero(self.movable_EG[:, hot])
        if not len(mine_S):
            return None
        barred_E = self.holds_EG[:, hot] | self.settled_EG[:, hot]  # what cannot come to the hot group
        back_P, group_P = self.movable_P
        wanted_P = ~barred_E[back_P]
        back_P, group_P = back_P[wanted_P], group_P[wanted_P]
        target_K = np.concatenate([np.arange(groups), group_P])
        share_K = np.concatenate([np.zeros(groups), self.share_E[back_P]])
        loads_K = np.concatenate([np.ones(groups), np.full(len(back_P), 2.0)])
        open_K = np.concatenate([self.free_G, np.ones(len(back_P), dtype=bool)])
        heat_K, relief_SK = self.heat_G[target_K], self.share_E[mine_S, None] - share_K
        # Giving away more than the difference would only change which of the two is hot.
        possible_SK = open_K & (relief_SK > 0) & (relief_SK < self.heat_G[hot] - heat_K)
        possible_SK &= ~(self.holds_EG[mine_S] | self.settled_EG[mine_S])[:, target_K]
        change_SK = (
            _power(self.heat_G[hot] - relief_SK)
            - self.power_G[hot]
            + _power(heat_K + relief_SK)
            - self.power_G[target_K]
        )
        shared_SK = self._shares_node(mine_S[:, None], hot, target_K)
        shared_SK[:, groups:] |= self._shares_node(back_P, group_P, hot)
        rate_SK = np.where(possible_SK, self._gain(change_SK) * np.where(shared_SK, SHARED_NODE, 1.0) / loads_K, 0.0)
        s, k = divmod(int(rate_SK.argmax()), len(target_K))
        if rate_SK[s, k] <= 0:
            return None
        give = Change(int(mine_S[s]), hot, int(target_K[k]))
        if k < groups:
            return Offer(float(rate_SK[s, k]), (give,))
        take = Change(int(back_P[k - groups]), give.target, hot)
        # First to where a slot is free, if one is.
        return Offer(
            2 * float(rate_SK[s, k]), (give, take) if self.free_G[give.target] or not self.free_G[hot] else (take, give)
        )

    def _further_copy(self) -> Offer | None:
        """One more copy of the expert with the most rows per copy."""
        share_E = np.where(self.pinned_E | (self.count_E == len(self.heat_G)), 0.0, self.share_E)
        e = int(share_E.argmax())
        if share_E[e] <= 0:
            return None
        new_share = self.load_E[e] / (self.count_E[e] + 1)
        heat_G = self.heat_G - self.holds_EG[e] * (share_E[e] - new_share)
        experts_change = _power(new_share) - self.power_E[e]
        open_G = ~(self.holds_EG[e] | self.settled_EG[e])
        add = self._copy_at(e, open_G & self.free_G, heat_G, new_share, experts_change)
        spare = self._least_missed(e)
        if spare is None:
            return add
        spare_share = self.load_E[spare] / (self.count_E[spare] - 1)
        heat_G = heat_G + self.holds_EG[spare] * (spare_share - self.share_E[spare])
        experts_change += _power(spare_share) - self.power_E[spare]
        place_G = open_G & self.movable_EG[spare]
        instead = self._copy_at(e, place_G, heat_G, new_share - spare_share, experts_change)
        if instead is None or (add is not None and add.gain >= instead.gain):
            return add
        return Offer(instead.gain, (Change(spare, instead.changes[0].target, -1), *instead.changes))

    def _least_missed(self, other_than: int) -> int | None:
        """The replicated expert whose copies would have the fewest rows each with one copy fewer."""
        replicated_E = (self.count_E > 1) & ~self.pinned_E
        replicated_E[other_than] = False
        if not replicated_E.any():
            return None
        return int(np.where(replicated_E, self.load_E / np.maximum(self.count_E - 1, 1), np.inf).argmin())

    def _copy_at(
        self, e: int, place_G: np.ndarray, heat_G: np.ndarray, added: float, experts_change: float
    ) -> Offer | None:
        """A copy of expert e at the best of the places. heat_G: without what is `added` at the place; experts_change:
        of the second sum of powers."""
        target_K = np.flatnonzero(place_G)
        if not len(target_K):
            return None
        power_G = _power(heat_G)
        change_K = power_G.sum() - self.power_G.sum() - power_G[target_K] + _power(heat_G[target_K] + added)
        gain_K = self._gain(change_K, experts_change) * np.where(
            self._shares_node(np.full(len(target_K), e), -1, target_K), SHARED_NODE, 1.0
        )
        k = int(gain_K.argmax())
        return Offer(float(gain_K[k]), (Change(e, -1, int(target_K[k])),)) if gain_K[k] > 0 else None

    def _shares_node(self, expert: np.ndarray, source: np.ndarray | int, target: np.ndarray | int) -> np.ndarray:
        """Whether a copy of the expert that comes to the target from the source finds another one on that node; the
        three are broadcast."""
        node = self.node_G[target]
        others = self.on_node_EN[expert, node]
        shares: np.ndarray = others - (self.node_G[source] == node) > 0
        return shares


@dataclass
class Slots:
    """What the groups hold, at most: per layer, and over all layers."""

    per_layer_G: np.ndarray
    total_G: np.ndarray


def search(
    holds_LEG: np.ndarray,
    load_LE: np.ndarray,
    slots: Slots,
    node_G: np.ndarray,
    pinned_LE: np.ndarray,
    *,
    layers: Iterable[int],
    least_rate: float,
    max_loads: int,
) -> list[tuple[int, Change]]:
    """The changes (layer, change) to make, in order: each takes at least `least_rate` per load off its layer's
    unevenness; at most max_loads loads.

    holds_LEG: bool, who holds a copy now. load_LE: rows in units of a mean group's. node_G: the number of each group's
    node. pinned_LE: bool, experts whose number of copies stays. layers: those that may be changed.
    """
    if len(np.unique(node_G)) == 1:
        node_G = np.arange(len(node_G))  # one node: nothing to spread over
    room_G = slots.total_G - holds_LEG.sum(axis=(0, 1))
    at_work = {
        layer: LayerSearch(load_LE[layer], holds_LEG[layer], slots.per_layer_G, node_G, pinned_LE[layer])
        for layer in layers
    }
    queue: list[tuple[float, int, Offer]] = []

    def ask(layer: int) -> None:
        offer = at_work[layer].best_offer(room_G, least_rate)
        if offer is not None:
            heapq.heappush(queue, (-offer.rate, layer, offer))

    for layer in at_work:
        ask(layer)
    done: list[tuple[int, Change]] = []
    while queue and max_loads > 0:
        _, layer, offer = heapq.heappop(queue)
        if offer.loads > max_loads:
            continue
        taken_G = _slots_taken(offer.changes, len(room_G))
        # Another layer took the slot meanwhile. A group may hold more than its slots: it takes nothing more then, and
        # changes that want none of its slots are made all the same.
        if ((taken_G > 0) & (taken_G > room_G)).any():
            ask(layer)
            continue
        at_work[layer].apply(offer.changes)
        room_G -= taken_G
        max_loads -= offer.loads
        done += [(layer, change) for change in offer.changes]
        ask(layer)
    return done


def _slots_taken(changes: Iterable[Change], groups: int) -> np.ndarray:
    taken_G = np.zeros(groups, dtype=np.int64)
    for _, source, target in changes:
        if target >= 0:
            taken_G[target] += 1
        if source >= 0:
            taken_G[source] -= 1
    return taken_G
