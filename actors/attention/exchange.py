"""The shard's side of the expert exchange: send a layer's rows to the groups that hold their experts, and add up what
comes back.

Which row goes where is decided in `row_split`. A link that fails is told to the shard, which has it mended or its group
replaced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from isotherm.actors.attention.lost_experts import ExpertsFailedError, ExpertsLostError
from isotherm.actors.attention.native_exchange import NativeLayers, Unfinished
from isotherm.actors.attention.offers import Offers
from isotherm.actors.attention.questions import Questions
from isotherm.actors.attention.row_split import NONE, GroupShare, layer_tables, share_of, split_rows
from isotherm.actors.links.protocol import Dispatch, ExpertNotHeldError, GroupFailedError, Link, LinkError, NativeLink
from isotherm.actors.pulse import Pulse
from isotherm.cluster.placement.table import Placement
from isotherm.kernels.ops import AttentionRows, DecoderLayer, Kernels, LinearWeight, Router

log = logging.getLogger(__name__)
WAIT = 0.5  # seconds between two signs of life of a thread that waits for lost experts
FAILED_ANSWERS = 3  # to one layer's rows, after which it is the rows that are wrong, not the groups


class ExpertExchange:
    """The routed experts of all layers, wherever they are. `links` maps group names to links.

    One thread runs the steps; others may `offer` placements and `relink` groups at any time. When a link fails in
    mid-layer the rows are sent to other copies; where there is none, the layer waits for a placement that has one, or
    for a new link, up to `patience` seconds since it was last told that one is to be expected (`offers`). No step is
    redone. `link_failed` is told the group, its link and the reason, on the stepping thread; it has the link mended or
    the group replaced. Where there is nobody to do that, a group's own failure is raised at once.
    """

    def __init__(
        self,
        kernels: Kernels,
        placement: Placement,
        links: Mapping[str, Link],
        *,
        patience: float = 120.0,
        link_failed: Callable[[str, Link, str], None] | None = None,
        pulse: Pulse | None = None,
        hidden: int = 1,
    ):
        """`hidden`: elements of a row, which messages without rows say too."""
        self.kernels, self.pulse, self._hidden = kernels, pulse or Pulse(), hidden
        self.questions = Questions()  # whether rows would get through
        self.patience, self._link_failed = patience, link_failed
        # By layer: counted over all layers, a layer's turn would always be odd, or even
        self._turns: dict[int, int] = {}
        self.offers = Offers()
        # Group → its link that has failed, as long as it has no other; also of groups that no placement names for now
        self._failed: dict[str, Link] = {}
        self._under_way: dict[str, Link] = {}  # group → the link on which an answer is still to come
        self._failed_answers = 0  # to the layer under way
        self.finding_fault = False  # a request is looked for that makes groups fail: their failures are raised
        self._row_index = {layer: i for i, layer in enumerate(placement.layers)}
        experts = len(placement.holders[0]) if placement.holders else 0
        self.rows_routed = np.zeros((len(placement.layers), experts), dtype=np.int64)
        # Times that each expert was computed at all: its weights were read
        self.reads = np.zeros_like(self.rows_routed)
        # Group → seconds spent waiting for it, once the answers before its own had come
        self.waited: dict[str, float] = {}
        self.waited_seconds = 0.0  # of all groups, those that are gone included
        self.adopt(placement, links)

    # --- placements and links ---------------------------------------------------------------------

    def adopt(self, placement: Placement, links: Mapping[str, Link]) -> None:
        """Route by this placement from the next dispatch on. Call on the stepping thread, between layers."""
        groups = placement.groups()
        if missing := [g for g in groups if g not in links]:
            raise ValueError(
                f"placement version {placement.version} names groups {missing} that this shard has no link to"
            )
        self.placement, self._groups, self._links = placement, groups, [links[g] for g in groups]
        self._tables = layer_tables(placement, groups)
        self._failed = {g: link for g, link in self._failed.items() if links.get(g) is link}
        self._native = self._native_layers()
        self.waited = {g: self.waited.get(g, 0.0) for g in groups}
        self.questions.follow(groups)

    def offer(self, placement: Placement, links: Mapping[str, Link], adopted: Callable[[], None]) -> None:
        """Ask for a placement to be adopted at the next layer boundary; `adopted` is called on the stepping thread when
        it is. Any thread."""
        self.offers.offer(placement, links, adopted)

    def relink(self, group: str, link: Link) -> None:
        """Send a group's rows over another link from the next dispatch on. Any thread."""
        self.offers.relink(group, link)

    def adopt_offered(self) -> None:
        """Adopt what was offered last, and new links, if there are any. On the stepping thread, between layers."""
        offered, on_adopted, relinked = self.offers.take()
        if offered is not None:
            self.adopt(*offered)
        for group, link in relinked.items():
            if group in self._groups:
                self._links[self._groups.index(group)] = link
                self._failed.pop(group, None)
                self._native = self._native_layers()
        for adopted in on_adopted:
            adopted()

    def _native_layers(self) -> NativeLayers | None:
        counters = {layer: (self.rows_routed[row], self.reads[row]) for layer, row in self._row_index.items()}
        wanted = self.offers.flag, self.questions.flag
        return NativeLayers.over(self.kernels, self._links, self.placement.version, self._tables, counters, wanted)

    def answer_questions(self) -> None:
        """Answer those who have asked whether rows would get through: they do where each group that is used has
        answered since, if need be a message without rows, and every expert has such a group. On the stepping thread,
        between layers."""
        for group in self.questions.take():
            if group not in self._failed:
                self._send_nothing(group)
        for group, link in list(self._under_way.items()):
            del self._under_way[group]
            try:
                self._answer(group, link)
            except (LinkError, ExpertNotHeldError) as error:
                self._mark_failed(group, link, error)
        self.questions.answer(not self._failed or all(self._alive(layer).any(axis=1).all() for layer in self._tables))

    def _send_nothing(self, group: str) -> None:
        link = self._links[self._groups.index(group)]
        x_UD = torch.empty(0, self._hidden, dtype=self.kernels.dtype, device=self.kernels.device)
        message = Dispatch(next(iter(self._tables)), self.placement.version, x_UD, NONE, NONE, np.zeros(1, np.int32))
        try:
            self.pulse.wait(group)
            link.send(message)
            self._under_way[group] = link
        except LinkError as error:
            self._mark_failed(group, link, error)
        finally:
            self.pulse.go_on()

    def _answer(self, group: str, link: Link) -> Tensor:
        """What a group answers. The wait begins anew with each part of it: on a slow line one answer may take longer
        than a group may be silent. Raises what the link raises."""
        try:
            self.pulse.wait(group)
            output_PD = link.receive(lambda: self.pulse.wait(group))
            self.pulse.answered()
            return output_PD
        finally:
            self.pulse.go_on()

    def bank_of(self, layer: int) -> None: ...  # each group has its own

    def begin_step(self) -> None:
        for link in self._links:
            link.in_step(True)

    def end_step(self) -> None:
        for link in self._links:
            link.in_step(False)

    def _some_have_failed(self) -> bool:
        """Of the links that are used."""
        return bool(self._failed) and not self._failed.keys().isdisjoint(self._groups)

    def _fail(self, group: str, link: Link, error: Exception) -> None:
        """Use a link no more, and tell whoever mends it. Raises ExpertsFailedError where the rows are the reason."""
        if isinstance(error, GroupFailedError | ExpertNotHeldError):
            self._failed_answers += 1
            if self._link_failed is None:
                raise error
            if self.finding_fault or self._failed_answers >= FAILED_ANSWERS:
                raise ExpertsFailedError(f"layer {self._layer}: {group} failed: {error}") from error
        self._mark_failed(group, link, error)

    def _mark_failed(self, group: str, link: Link, error: Exception) -> None:
        log.warning("the link to expert group %s has failed: %s", group, error)
        if self._failed.get(group) is not link:
            self._failed[group] = link
            if self._link_failed is not None:
                self._link_failed(group, link, str(error))

    # --- a layer ----------------------------------------------------------------------------------

    def moe(
        self,
        layer: int,
        x_TD: Tensor,
        router: Router,
        gate_up: LinearWeight | None,
        down: LinearWeight | None,
        residual_TD: Tensor,
    ) -> Tensor:
        """residual + (Σ weight × expert + shared experts) → [T, D]. Where links allow it, the shared experts overlap
        the exchange."""
        turn = self._begin_layer(layer)
        if self._some_have_failed() or (native := self._native) is None:
            self._dispatch(layer, x_TD, *self.kernels.route(x_TD, router), turn)
        else:
            done = native.moe(layer, x_TD, router, (gate_up, down), residual_TD, turn)
            self._count_waits(native)
            self.pulse.begin()
            if not isinstance(done, Unfinished):
                self.pulse.answered(native.take_longest())
                for number in native.answered():
                    self.questions.heard(self._groups[number])
                return done
            self._go_on(layer, x_TD, done, turn)
        return self._finish(x_TD, gate_up, down, residual_TD)

    def _finish(
        self, x_TD: Tensor, gate_up: LinearWeight | None, down: LinearWeight | None, residual_TD: Tensor
    ) -> Tensor:
        own_TD = None if gate_up is None or down is None else self.kernels.mlp(x_TD, gate_up, down)
        return self.combine(own_TD, residual_TD)

    def advance(
        self,
        layers: Sequence[DecoderLayer],
        first: int,
        begin: int,
        x_TD: Tensor,
        rows: AttentionRows,
        caches: Sequence[Tensor],
    ) -> tuple[int, Tensor] | None:
        """As RoutedExperts says. What is unusual in a layer is done in Python; those before it are in one call."""
        if self._some_have_failed() or (native := self._native) is None:
            return None
        self.pulse.beat()
        began, waited, self._failed_answers = time.monotonic(), self.waited_seconds, 0
        gone = native.advance(layers, first, begin, x_TD, rows, caches, self._turns)
        if gone is None:
            return None
        self._count_waits(native)
        self.pulse.worked(time.monotonic() - began - (self.waited_seconds - waited))
        if longest := native.take_longest():
            self.pulse.answered(longest)
        if gone.h_TD is None:
            return gone.at, gone.x_TD
        layer, number = layers[gone.at], first + gone.at
        assert layer.router is not None
        if gone.unfinished is None:
            x_TD = self.moe(number, gone.h_TD, layer.router, layer.gate_up, layer.down, gone.x_TD)
        else:
            self._go_on(number, gone.h_TD, gone.unfinished, self._turns[number])
            x_TD = self._finish(gone.h_TD, layer.gate_up, layer.down, gone.x_TD)
        return gone.at + 1, x_TD

    def _dispatch(self, layer: int, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, turn: int) -> None:
        self._set_layer(layer, x_TD, ids_Tk, weights_Tk, turn)
        for share in self._shares:
            self._send(share)
        # While the groups compute
        rows_E = np.bincount(self._ids_Tk.ravel(), minlength=self.rows_routed.shape[1])
        self.rows_routed[self._row_index[layer]] += rows_E
        self.reads[self._row_index[layer]] += rows_E > 0

    def _begin_layer(self, layer: int) -> int:
        """The layer's turn, under the placement that is in force from now on."""
        self.pulse.beat()
        if self.offers.waiting:
            self.adopt_offered()
            self.begin_step()
        if self.questions.waiting:
            self.answer_questions()
        self._failed_answers = 0
        turn = self._turns[layer] = self._turns.get(layer, layer) + 1
        return turn

    def _set_layer(self, layer: int, x_TD: Tensor, ids_Tk: Tensor, weights_Tk: Tensor, turn: int) -> None:
        ids = ids_Tk.cpu().numpy()
        self._layer, self._x_TD, self._ids_Tk, self._weights_Tk = layer, x_TD, ids, weights_Tk
        self._shares = split_rows(ids, self._tables[layer], turn)

    def _go_on(self, layer: int, x_TD: Tensor, unfinished: Unfinished, turn: int) -> None:
        """Take over what was begun in native code: send what was not sent; the rest is under way."""
        self._set_layer(layer, x_TD, unfinished.ids_Tk, unfinished.weights_Tk, turn)
        for share in self._shares:
            link = self._links[share.group]
            if pairs := unfinished.pairs_sent[share.group]:
                assert isinstance(link, NativeLink) and pairs == len(share.pairs_P)
                link.expect(pairs, x_TD.shape[1], x_TD.dtype)
                self._under_way[self._groups[share.group]] = link
            else:
                self._send(share)

    def _count_waits(self, native: NativeLayers) -> None:
        for group, nanoseconds in zip(self._groups, native.take_waits(), strict=True):
            self.waited[group] += 1e-9 * nanoseconds
            self.waited_seconds += 1e-9 * nanoseconds

    def _send(self, share: GroupShare) -> None:
        group, link = self._groups[share.group], self._links[share.group]
        if group in self._failed:
            return
        rows_U = share.rows_U
        x_UD = self._x_TD if len(rows_U) == len(self._x_TD) else self._x_TD[torch.from_numpy(rows_U)]
        version = self.placement.version
        message = Dispatch(self._layer, version, x_UD, share.rows_P, share.experts_A, share.offsets_A1)
        try:
            self.pulse.wait(group)  # until what was sent before has gone
            link.send(message)
            self._under_way[group] = link
        except LinkError as error:
            self._fail(group, link, error)
        finally:
            self.pulse.go_on()

    def combine(self, own_TD: Tensor | None = None, residual_TD: Tensor | None = None) -> Tensor:
        answered, outputs = self._receive(self._shares)
        while sum(len(share.pairs_P) for share in answered) < self._weights_Tk.numel():
            # What has come is copied: views into a link's memory end with its next message.
            outputs = [y.clone() for y in outputs]
            done = np.concatenate([NONE, *(share.pairs_P for share in answered)])
            more, new = self._receive(self._resend(np.setdiff1d(np.arange(self._weights_Tk.numel()), done)))
            answered, outputs = answered + more, outputs + new
        index = np.empty(self._weights_Tk.numel(), dtype=np.int32)
        index[np.concatenate([share.pairs_P for share in answered])] = np.arange(len(index), dtype=np.int32)
        y_PD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        index_Tk = torch.from_numpy(index).view(self._weights_Tk.shape)
        return self.kernels.combine(y_PD, index_Tk, self._weights_Tk, own_TD, residual_TD)

    def _receive(self, shares: list[GroupShare]) -> tuple[list[GroupShare], list[Tensor]]:
        """The shares that were answered, with their outputs."""
        answered, outputs = [], []
        for share in shares:
            group = self._groups[share.group]
            if (link := self._under_way.pop(group, None)) is None:
                continue  # it could not be sent
            begin = time.perf_counter()
            try:
                outputs.append(self._answer(group, link))
                answered.append(share)
                self.questions.heard(group)
            except (LinkError, ExpertNotHeldError) as error:
                self._fail(group, link, error)
            seconds = time.perf_counter() - begin
            self.waited[group] = self.waited.get(group, 0.0) + seconds
            self.waited_seconds += seconds
        return answered, outputs

    def abandon(self) -> None:
        """Take the answers that are still under way, after an error in `moe`: left alone, they would be taken for those
        to the next layer's rows, or be written over them."""
        while self._under_way:
            group, link = self._under_way.popitem()
            try:
                self._answer(group, link)
            except (ExpertNotHeldError, GroupFailedError):
                pass  # an answer as well: the link is whole
            except Exception as error:
                self._mark_failed(group, link, error)

    def _resend(self, pairs: np.ndarray) -> list[GroupShare]:
        """Send the given pairs (places in the flattened [T, k]) to groups that are left, waiting for those that have
        their experts."""
        top_k = self._ids_Tk.shape[1]
        experts = self._ids_Tk.ravel()[pairs]
        alive = self._await_holders(experts)
        table = self._tables[self._layer]
        # One row per pair: its expert, at the first copy that is left.
        group_P = table.copies[experts, alive.argmax(axis=1)[experts]]
        shares = []
        for group in np.unique(group_P):
            mine = (group_P == group).nonzero()[0]
            mine = mine[experts[mine].argsort(kind="stable")]
            shares.append(share_of(int(group), len(self._x_TD), top_k, pairs[mine], experts[mine]))
        for share in shares:
            self._send(share)
        return shares

    def _alive(self, layer: int) -> np.ndarray:
        """Which copies of a layer's experts can be reached, bool [experts, copies]."""
        return self._tables[layer].alive([group in self._failed for group in self._groups])

    def _await_holders(self, experts: np.ndarray) -> np.ndarray:
        """Wait until each of these experts has a copy that can be reached → which copies can, bool [experts, copies].
        Raises ExpertsLostError."""
        begin = time.monotonic()
        while True:
            deadline = max(begin, self.offers.expected) + self.patience
            if self.offers.waiting:
                self.adopt_offered()
                self.begin_step()
            alive = self._alive(self._layer)
            without_copy: np.ndarray = ~np.any(alive, axis=1)
            orphans = np.unique(experts[without_copy[experts]])
            if not len(orphans):
                return alive
            if time.monotonic() > deadline:
                where = f"layer {self._layer}: no group that can be reached holds experts {orphans.tolist()}"
                raise ExpertsLostError(f"{where}, and in {self.patience:g} s none was given them")
            self.pulse.stand()  # it waits for the controller
            self.offers.wait(min(WAIT, max(0.0, deadline - time.monotonic())))
