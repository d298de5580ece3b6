"""Which tokens of which requests an attention shard computes in its next step. Pure: requests and sampled tokens in,
plans and deltas out.

Continuous batching under a token budget: first one token for every request that is generating, then chunks of prompts.
When KV blocks run out, the request that came last gives its blocks back and is recomputed later. Who is next, and who
gives way, is policy.py's.
"""

from __future__ import annotations

import math
import time
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice

from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.kv_blocks import BlockManager
from isotherm.cluster.engine.places import BACKGROUND, ShardPlaces
from isotherm.cluster.engine.policy import Waiting, precedence, victims
from isotherm.cluster.engine.sequence import Chunk, Form, Sampled, ScheduledSequence, verified
from isotherm.cluster.engine.step_plan import StepPlan
from isotherm.cluster.engine.yielding import Yielding
from isotherm.cluster.messages.requests import (
    Delta,
    FinishReason,
    GenerationRequest,
    PromptLogprobs,
    TokenLogprobs,
)


class Scheduler:
    """`clock` gives seconds; it is read for what requests are told of their wait, and decides nothing."""

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float] = time.monotonic):
        self.config, self._clock = config, clock
        self.blocks = BlockManager(config.blocks, config.block_size)
        self.waiting = Waiting()
        self.running: list[ScheduledSequence] = []  # by precedence: the last one gives way first
        # The first in the queue, and the blocks that were there and known when there was no room for it; None where
        # somebody has left since
        self._blocked: tuple[ScheduledSequence, int, int] | None = None
        self._by_id: dict[str, ScheduledSequence] = {}
        self._places = ShardPlaces(config.room)
        self._arrivals = 0
        self.preemptions = 0
        self.looked_up = self.found = 0  # prompt tokens: in the prefix cache, once for each request
        self.waited = 0.0  # seconds for which this shard waited for others so far; kept by whoever runs the steps
        self.yielding = Yielding()
        self.is_shared = False  # background work and other requests are here

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request. Raises ValueError where it can never be served, and QueueFullError where there is no room
        for a new one. One that was accepted before, here or elsewhere, always has room: what is in flight is not lost.
        """
        if not request.prompt:
            raise ValueError("prompt is empty")
        if request.id in self._by_id:
            raise ValueError(f"request id {request.id} is in use")
        longest = self.config.max_model_len - min(1, request.params.max_tokens)
        if len(request.prompt) > longest:
            raise ValueError(f"prompt has {len(request.prompt)} tokens; at most {longest} leave room for the output")
        room = min(request.params.max_tokens, self.config.max_model_len - len(request.prompt))
        if request.generated and len(request.generated) >= room:
            raise ValueError(
                f"request {request.id} resumes after {len(request.generated)} output tokens, "
                f"of which it may have only {room}"
            )
        sequence = ScheduledSequence(
            request, self._arrivals, [*request.prompt, *request.generated], scored=request.scored
        )
        sequence.expected = self._places.enter(request)
        sequence.since = self._clock()
        self._arrivals += 1
        self._by_id[request.id] = sequence
        self.waiting.add(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks. False where it is not here (any more)."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return False
        self._places.leave(sequence.request, sequence.expected)
        if sequence.generated:
            self._places.lengths.ended(sequence.generated)
        if sequence.running:
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.admitted:
            self.waiting.ended(sequence)
        return True

    def fail(self, request_id: str, why: str, param: str = "") -> list[Delta]:
        """Forget a request that cannot go on, and say so; nothing where it is not here. `param`: as Delta's
        `error_param`."""
        sequence = self._by_id.get(request_id)
        if sequence is None or not self.abort(request_id):
            return []
        return [Delta(request_id, sequence.generated, finish_reason=FinishReason.ERROR, error=why, error_param=param)]

    def request_ids(self) -> list[str]:
        return list(self._by_id)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, decode form first; empty when there is nothing to do."""
        step = StepPlan(self.config.max_batch_tokens, self.preemptions)
        self.is_shared = self._places.has_background_and_others
        if not self.is_shared:
            self._plan(step, self.running.copy(), math.inf)
        else:
            self._plan(step, [one for one in self.running if not one.is_background], BACKGROUND)
            if tokens := step.tokens:
                wanted = self._wanted_in_background(step.budget)
                step.limit(tokens + self.yielding.allowance(tokens, wanted))
            self._plan(step, [one for one in self.running if one.is_background], math.inf)
        for sequence in step.held:
            self.waiting.add(sequence)
        chunks = step.chunks
        return sorted(chunks, key=lambda c: c.form is Form.PREFILL)

    def _plan(self, step: StepPlan, running: Sequence[ScheduledSequence], before: float) -> None:
        """Chunks of those that run, and of those that wait in classes before this one."""
        prompts: list[ScheduledSequence] = []  # or what is computed again
        for sequence in running:
            if sequence.remaining > 1 or sequence.computed < sequence.prompt_length:
                prompts.append(sequence)
            elif step.budget > 0 and sequence.running and self._reserve(sequence, 1):
                step.chunks.append(self._chunk(sequence, 1))
                step.budget -= 1
        for sequence in prompts:
            if (first := self.waiting.first()) is not None and first.request.priority < sequence.request.priority:
                self._admit_all(step, before=sequence.request.priority)
            if step.budget > 0 and sequence.running:
                count = self._next_count(sequence, step.budget)
                if self._reserve(sequence, count):
                    step.chunks.append(self._chunk(sequence, count))
                    step.budget -= count
        self._admit_all(step, before)

    def _admit_all(self, step: StepPlan, before: float) -> None:
        """Those that wait, of classes before this one."""
        step.drop_preempted(self.preemptions)
        while step.budget > 0 and (first := self.waiting.first()) is not None and first.request.priority < before:
            if self._waits_for_family(first):
                step.held.append(first)
                self.waiting.set_aside(first)
                continue
            chunk = self._admit(first, step.budget)
            step.drop_preempted(self.preemptions)  # also where those that gave way were not enough
            if chunk is None:
                break
            step.chunks.append(chunk)
            step.budget -= chunk.count

    def _wanted_in_background(self, budget: int) -> int:
        """Tokens that background work would have in a step of its own, at most so many."""
        first = self.waiting.first()
        wanted = 0 if first is None or not first.is_background else len(first.tokens)
        wanted += sum(self._next_count(one, budget) for one in self.running if one.is_background)
        return min(wanted, budget)

    def took(self, chunks: Sequence[Chunk], seconds: float) -> None:
        """A step that background work might share (`is_shared`) took this long."""
        background = sum(chunk.count for chunk in chunks if chunk.sequence.is_background)
        if others := sum(chunk.count for chunk in chunks) - background:
            self.yielding.took(others, background, seconds)

    def _next_count(self, sequence: ScheduledSequence, budget: int) -> int:
        until = sequence.prompt_length if sequence.computed < sequence.prompt_length else len(sequence.tokens)
        return min(until - sequence.computed, budget)

    def _chunk(self, sequence: ScheduledSequence, count: int) -> Chunk:
        form = Form.PREFILL if sequence.computed < sequence.prompt_length else Form.DECODE
        sample = count == sequence.remaining and sequence.request.params.max_tokens > 0
        return Chunk(sequence, sequence.computed, count, form, sample)

    def _blocks_for(self, sequence: ScheduledSequence, tokens: int) -> int:
        return -(-tokens // self.config.block_size) - len(sequence.blocks)

    def _reserve(self, sequence: ScheduledSequence, count: int) -> bool:
        """Blocks for `count` more tokens, preempting who gives way; False where `sequence` itself had to."""
        while True:
            taken = self.blocks.allocate(max(0, self._blocks_for(sequence, sequence.computed + count)))
            if taken is not None:
                sequence.blocks += taken
                return True
            victim = self.running[-1]
            self.preempt(victim.request.id)
            if victim is sequence:
                return False

    def preempt(self, request_id: str) -> None:
        """Take a running request's blocks; it waits, before those that have had none yet, to be recomputed."""
        sequence = self._by_id[request_id]
        self._leave(sequence)
        sequence.blocks, sequence.computed = [], 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.add(sequence)

    def _leave(self, sequence: ScheduledSequence) -> None:
        """Of those that run."""
        self.running.remove(sequence)
        sequence.running = False
        self.blocks.release(sequence.blocks)
        self._blocked = None

    def _admit(self, sequence: ScheduledSequence, budget: int) -> Chunk | None:
        """The first chunk of one that waits, where there is room for it, or where room can be made by those that give
        way to it."""
        seen = (sequence, self.blocks.available, self.blocks.registered)
        if self._blocked == seen:
            return None  # nothing has changed for it since it was looked at last
        if len(self.running) < self.config.max_sequences and (chunk := self._begin(sequence, budget)) is not None:
            return chunk
        need = self._blocks_for(sequence, len(sequence.tokens)) - self.blocks.available
        if found := victims(self.running, sequence, need):
            for victim in found:
                self.preempt(victim.request.id)
            return self._begin(sequence, budget)
        self._blocked = seen
        return None

    def _waits_for_family(self, sequence: ScheduledSequence) -> bool:
        """Whether one of its family computes the blocks of their prompt just now: it then begins with these."""
        family, size = sequence.request.family, self.config.block_size
        if not family or not self.config.prefix_cache or not sequence.is_scored:
            return False
        shared = sequence.shared_blocks(size)
        relatives = [other for other in self.running if other.request.family == family] if shared else []
        if not relatives:
            return False
        if not sequence.keys:
            sequence.keys = relatives[0].keys[:shared]  # a long prompt is hashed once
        if self.blocks.knows(sequence.key(shared - 1, size)):
            return False
        return any(other.computed < shared * size for other in relatives)

    def _begin(self, sequence: ScheduledSequence, budget: int) -> Chunk | None:
        size = self.config.block_size
        if self.config.prefix_cache:
            full = sequence.reusable_blocks(size)
            sequence.blocks = self.blocks.match([sequence.key(i, size) for i in range(full)])
            sequence.computed = len(sequence.blocks) * size
        count = self._next_count(sequence, budget)
        # Room for all its known tokens, not only for the first chunk: else it would soon give way to an older request,
        # and be recomputed.
        enough = self._blocks_for(sequence, len(sequence.tokens)) <= self.blocks.available
        taken = self.blocks.allocate(max(0, self._blocks_for(sequence, sequence.computed + count))) if enough else None
        if taken is None:
            self.blocks.release(sequence.blocks)
            sequence.blocks, sequence.computed = [], 0
            return None
        sequence.blocks += taken
        if not sequence.admitted:
            sequence.admitted = True
            sequence.queued = self._clock() - sequence.since
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
            sequence.waited_before = self.waited
            if self.config.prefix_cache:
                self.looked_up += sequence.prompt_length
                self.found += sequence.cached_tokens
        self.waiting.remove(sequence, has_turn=True)
        sequence.running = True
        insort(self.running, sequence, key=precedence)
        return self._chunk(sequence, count)

    def complete(
        self,
        chunks: Iterable[Chunk],
        sampled: Iterable[Sampled],
        scored: Mapping[str, Sequence[TokenLogprobs]] | None = None,
    ) -> list[Delta]:
        """Take a step's results, one `Sampled` per row that is sampled, in order, and by request what the rows gave
        that score its prompt; give what is new for each request."""
        results = iter(sampled)
        deltas = []
        for chunk in chunks:
            sequence = chunk.sequence
            new: Sequence[Sampled] = ()
            if chunk.draft:
                new = verified(chunk, list(islice(results, chunk.samples)))
            elif chunk.sample:
                new = (next(results),)
            if not sequence.running:
                continue  # aborted or preempted while the step was computed: its blocks are no longer its own
            failed = new[-1] if new and new[-1].error else None
            if failed is not None:
                new = new[:-1]
            prompt = None
            if scored and (scores := scored.get(sequence.request.id)):
                prompt = PromptLogprobs(chunk.scores.start, tuple(scores))
                sequence.scored += len(scores)
            start, tokens = sequence.generated, sequence.tokens
            for result in new:
                tokens.append(result.token_id)
            # Drafts that were guessed right are computed already; what was computed of others is overwritten.
            sequence.computed += chunk.known + (len(new) - 1 if len(new) > 1 else 0)
            self._give_back_spare(sequence)
            if chunk.form is Form.PREFILL:
                sequence.note(self._clock(), chunk.count)
            if self.config.prefix_cache:
                self._register_full_blocks(sequence, chunk.start)
            if new or (failed is None and (prompt is not None or not sequence.remaining)):
                right = sequence.verified[1] if chunk.draft else 0
                deltas.append(self._delta(sequence, start, new, prompt, right, len(chunk.draft) - right))
            if failed is not None:
                deltas += self.fail(sequence.request.id, failed.error, failed.error_param)
        return deltas

    def _register_full_blocks(self, sequence: ScheduledSequence, start: int) -> None:
        size = self.config.block_size
        for index in range(start // size, sequence.computed // size):
            self.blocks.register(sequence.blocks[index], sequence.key(index, size))

    def _give_back_spare(self, sequence: ScheduledSequence) -> None:
        """Blocks that were taken for drafts alone: nobody is to wait or give way for these."""
        keep = -(-sequence.computed // self.config.block_size)
        if len(sequence.blocks) > keep:
            self.blocks.release(sequence.blocks[keep:])
            del sequence.blocks[keep:]

    def _delta(
        self,
        sequence: ScheduledSequence,
        start: int,
        new: Sequence[Sampled],
        prompt: PromptLogprobs | None,
        right: int,
        wrong: int,
    ) -> Delta:
        """What a request is given; it ends where these are its last tokens. `right`, `wrong`: of its drafts."""
        request, params = sequence.request, sequence.request.params
        count = start + len(new)  # of output tokens
        reason = None
        if new and new[-1].token_id in params.stop_token_ids:
            reason = FinishReason.STOP
        elif not new:
            if not sequence.remaining:  # it wants no output, and all of its prompt is computed
                reason = FinishReason.LENGTH
        elif count >= params.max_tokens or sequence.prompt_length + count >= self.config.max_model_len:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.abort(request.id)
        tokens = (new[0].token_id,) if len(new) == 1 else tuple(result.token_id for result in new)
        logprobs = tuple(r.logprobs for r in new if r.logprobs is not None) if new and new[0].logprobs else ()
        cached, queued = sequence.cached_tokens, sequence.queued
        told = reason is not None or start == len(request.generated)
        course = sequence.course(self.waited) if told else None
        return Delta(request.id, start, tokens, reason, logprobs, cached, "", prompt, queued, course, right, wrong)
