"""Drafts by the model's own multi-token-prediction layer, applied once for each token of a draft.

For each stream the layer has a KV cache in the blocks that the stream has for the main model. Its entries are a run of
positions that begins at a block and grows as the stream does; those of guesses are written behind its end and
overwritten by what came. A run may begin late: at the last WINDOW positions of a prompt (a block's, where it has
more), after a prefix whose entries nobody has computed, after steps in which there were no drafts. That costs
acceptance and no token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from isotherm.actors.attention.sampling import drawn, temperature_of
from isotherm.actors.models.mtp import MtpLayer
from isotherm.actors.models.protocol import RoutedExperts
from isotherm.actors.models.step_batch import Span, attention_rows
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.kernels.ops import DraftStream

WINDOW = 64  # positions of which the main model's output is kept until the layer has had them: what a late begin costs
EXPANDED = 8  # rows of a stream from which on prefill form is the quicker one

HeldRows = tuple[Tensor, int, int]  # of a step's output [T, D] the rows from this one on, so many


@dataclass
class Run:
    """What the layer has of one sequence: entries for positions begin … end-1, and rows of the main model's output for
    positions held_from … held_to-1, which are still to come."""

    preemptions: int
    begin: int
    end: int
    held_from: int
    held_to: int
    window: int = WINDOW  # rows that are kept at least: as many as a block has positions, for a run begins at one
    held: deque[HeldRows] = field(default_factory=deque)

    def hold(self, rows_TD: Tensor, row: int, count: int) -> None:
        if (skipped := count - self.window) > 0:
            self.held.clear()
            self.held_from = self.held_to + skipped
            self.held_to, row, count = self.held_from, row + skipped, self.window
        # A few rows are not to keep all of a large step's. Those of small steps are kept as they are: a copy for each
        # stream would take longer than all else that is done here, also in steps without drafts.
        if 2 * count < len(rows_TD) > self.window:
            rows_TD, row = rows_TD[row : row + count].clone(), 0
        self.held.append((rows_TD, row, count))
        self.held_to += count
        while self.held_to - self.held_from - self.held[0][2] >= self.window:
            self.held_from += self.held.popleft()[2]

    def first(self, most: int, block_size: int) -> int | None:
        """The position from which the held rows, at most so many, go on with the run or begin one; None where they can
        do neither yet."""
        first = max(self.held_from, self.held_to - most)
        if first != self.end:
            first = -(-first // block_size) * block_size
        return first if first < self.held_to else None

    def take(self, most: int, block_size: int) -> tuple[int, list[HeldRows]] | None:
        """The held rows from `first` on, and that position."""
        first = self.first(most, block_size)
        if first is None:
            return None
        if first != self.end:
            self.begin = first
        rows, at = [], self.held_from
        for x_TD, row, count in self.held:
            if (skip := max(0, first - at)) < count:
                rows.append((x_TD, row + skip, count - skip))
            at += count
        self.held.clear()
        self.held_from = self.end = self.held_to
        return first, rows


class _Begun(NamedTuple):
    """What the first pass of some drafts has of one stream."""

    place: int  # among those asked
    sequence: ScheduledSequence
    span: Span
    hidden: list[HeldRows]  # the main model's output, of the span's positions
    tokens: list[int]  # after each of these
    written_from: int  # where entries that nobody had written begin


class MtpDrafter:
    kind = "mtp"

    def __init__(
        self,
        layer: MtpLayer,
        experts: RoutedExperts,
        config: SchedulerConfig,
    ):
        self.layer, self._experts, self._config = layer, experts, config
        self._cache = layer.new_cache(config.blocks, config.block_size)
        self._whole = layer.whole(experts)
        self.passes: Sequence[int] = ()
        self.looks_back = max(WINDOW, config.block_size)
        self._written: dict[int, bytes] = {}  # block → the prefix whose entries it holds, all of them

    def most(self, sequence: ScheduledSequence, room: int) -> int:
        run = sequence.drafting
        if not isinstance(run, Run) or run.preemptions != sequence.preemptions or run.held_to != sequence.computed:
            return 0
        begins = run.first(min(self._config.max_batch_tokens, run.window), self._config.block_size) is not None
        return room if begins and sequence.remaining == 1 else 0

    def computed(self, chunks: Sequence[Chunk], rows_TD: Tensor) -> None:
        row = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.running and sequence.request.params.speculate:
                run = sequence.drafting
                if not isinstance(run, Run) or run.preemptions != sequence.preemptions or run.held_to != chunk.start:
                    run = sequence.drafting = self._new_run(sequence, chunk.start)
                run.hold(rows_TD, row, sequence.computed - chunk.start)
            row += chunk.count

    def _new_run(self, sequence: ScheduledSequence, start: int) -> Run:
        """One that goes on with the entries of a cached prefix, as far as they are there."""
        size, window = self._config.block_size, self.looks_back
        if start % size:  # after drafts that failed: it begins at the next block
            return Run(sequence.preemptions, start, -1, start, start, window)
        block, begin = start // size, start
        while block and block <= len(sequence.keys):
            block -= 1
            if self._written.get(sequence.blocks[block]) != sequence.keys[block]:
                break
            begin = block * size
        return Run(sequence.preemptions, begin, start, start, start, window)

    @torch.inference_mode()
    def draft(self, asked: Sequence[tuple[ScheduledSequence, int]]) -> list[list[int]]:
        self.passes = ()
        begun = self._begin(asked)
        if not begun:
            return [[] for _ in asked]
        try:
            return self._guess(asked, begun)
        except BaseException:
            for one in begun:  # entries that its run counts are not there
                one.sequence.drafting = None
            raise

    def _begin(self, asked: Sequence[tuple[ScheduledSequence, int]]) -> list[_Begun]:
        """The spans of positions that the layer has not had, as many as a pass has room for; those in decode form come
        first."""
        begun: list[_Begun] = []
        room, size = self._config.max_batch_tokens, self._config.block_size
        for i, (sequence, _) in enumerate(asked):
            run = sequence.drafting
            assert isinstance(run, Run)
            old_end = run.end
            if room > 0 and (taken := run.take(min(room, run.window), size)) is not None:
                first, hidden = taken
                count = run.end - first
                room -= count
                for block in sequence.blocks[first // size :]:
                    self._written.pop(block, None)
                form = Form.PREFILL if count >= EXPANDED else Form.DECODE
                span = Span(sequence.blocks, first, count, form, run.begin // size)
                tokens = sequence.tokens[first + 1 : run.end + 1]
                begun.append(_Begun(i, sequence, span, hidden, tokens, max(old_end, run.begin)))
        begun.sort(key=lambda one: one.span.form is Form.PREFILL)
        return begun

    def _guess(self, asked: Sequence[tuple[ScheduledSequence, int]], begun: Sequence[_Begun]) -> list[list[int]]:
        """In one call, where the kernels have the layer so and its experts are here; else pass by pass."""
        given = None
        if self._whole is not None:
            streams = [self._stream(one, asked[one.place][1]) for one in begun]
            given = self.layer.kernels.draft(self._whole, self._cache, streams)
        if given is None:
            given = self._pass_by_pass(asked, begun)
        counts = [len(tokens) for tokens in given]
        if all(one.span.form is Form.DECODE for one in begun):
            self.passes = tuple(sum(n > at for n in counts) for at in range(max(counts)))
        drafts: list[list[int]] = [[] for _ in asked]
        for one, tokens in zip(begun, given, strict=True):
            drafts[one.place] = tokens
            self._mark(one)
        return drafts

    def _stream(self, one: _Begun, guesses: int) -> DraftStream:
        blocks, start, _, form, skipped = one.span
        params = one.sequence.request.params
        return DraftStream(
            blocks, skipped, start, one.tokens, form is Form.PREFILL, one.hidden, guesses, temperature_of(params),
            params.top_p, params.top_k, params.seed, one.sequence.generated,
        )  # fmt: skip

    def _pass_by_pass(self, asked: Sequence[tuple[ScheduledSequence, int]], begun: Sequence[_Begun]) -> list[list[int]]:
        drafts: list[list[int]] = [[] for _ in asked]
        if self.layer.layer.router is not None:  # a dense layer has no rows for them
            self._experts.begin_step()
        rows = self.layer.hidden(torch.cat([x_TD[row : row + n] for one in begun for x_TD, row, n in one.hidden]))
        hidden = self._pass([one.span for one in begun], [token for one in begun for token in one.tokens], rows)
        last, row = [], -1
        for one in begun:
            last.append(row := row + one.span.rows)
        going = [(i, Span(s.blocks, s.start + s.rows - 1, 1, Form.DECODE, s.skipped)) for i, _, s, *_ in begun]
        hidden = hidden[torch.tensor(last, device=hidden.device)] if len(last) < len(hidden) else hidden
        while True:
            for (i, _), token in zip(going, self._tokens(asked, drafts, [i for i, _ in going], hidden), strict=True):
                drafts[i].append(token)
            kept = [at for at, (i, _) in enumerate(going) if len(drafts[i]) < asked[i][1]]
            if not kept:
                return [drafts[one.place] for one in begun]
            if len(kept) < len(going):
                hidden = hidden[torch.tensor(kept, device=hidden.device)]
            going = [(i, span._replace(start=span.start + 1)) for i, span in (going[at] for at in kept)]
            hidden = self._pass([span for _, span in going], [drafts[i][-1] for i, _ in going], hidden)

    def _pass(self, spans: Sequence[Span], tokens: Sequence[int], hidden_TD: Tensor) -> Tensor:
        rows = attention_rows(spans, self._config.block_size, self.layer.cos, self.layer.sin)
        token_ids = torch.tensor(tokens, device=hidden_TD.device)
        try:
            return self.layer.forward(hidden_TD, token_ids, rows, self._cache, self._experts)
        except BaseException:
            self._experts.abandon()
            raise

    def _tokens(
        self,
        asked: Sequence[tuple[ScheduledSequence, int]],
        drafts: Sequence[Sequence[int]],
        going: Sequence[int],
        hidden_ND: Tensor,
    ) -> list[int]:
        """One more token for each of those that go on. It is drawn with the noise that its own place will have, so that
        a sampled token is guessed as well as a greedy one."""
        logits = self.layer.logits(hidden_ND)
        params = [asked[i][0].request.params for i in going]
        temperatures = list(map(temperature_of, params))
        if not any(temperatures):
            greedy: list[int] = logits.argmax(-1).tolist()
            return greedy
        indices = [asked[i][0].generated + len(drafts[i]) for i in going]
        tokens = drawn(self.layer.kernels, logits, params, temperatures, indices)
        return [max(0, token) for token in tokens]  # of logits that are no numbers: a guess like any other

    def _mark(self, one: _Begun) -> None:
        """Remember which blocks hold all entries of a prefix that others may find in the cache."""
        if self._config.prefix_cache:
            sequence, size = one.sequence, self._config.block_size
            for index in range(one.written_from // size, (one.span.start + one.span.rows) // size):
                self._written[sequence.blocks[index]] = sequence.key(index, size)
