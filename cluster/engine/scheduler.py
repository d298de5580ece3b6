"""Which tokens of which requests an attention shard computes in its next step. Pure: requests and sampled tokens in,
plans and deltas out.

Continuous batching under a token budget: first one token for every request that is generating, then chunks of prompts.
When KV blocks run out, the request that came last gives its blocks back and is recomputed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from isotherm.cluster.engine.kv_blocks import ROOT_KEY, BlockManager, block_key
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, TokenLogprobs


class QueueFullError(ValueError):
    """There are as many requests as there may be; a later try may be taken."""


class Form(Enum):
    """How attention is computed. Prompt tokens always in prefill form and generated tokens always in decode form, also
    when they are recomputed, so that a token's bits do not depend on what happened to its request."""

    PREFILL = "prefill"  # latents expanded to keys and values
    DECODE = "decode"  # absorbed


@dataclass(frozen=True)
class SchedulerConfig:
    block_size: int  # tokens per KV block
    blocks: int
    max_batch_tokens: int  # tokens per step, all requests together
    max_sequences: int  # requests that hold KV blocks at once
    max_model_len: int  # prompt and output of one request
    prefix_cache: bool = True
    max_waiting: int | None = None  # requests beyond max_sequences; None: any number

    def __post_init__(self) -> None:
        for name in ("block_size", "blocks", "max_batch_tokens", "max_sequences", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.max_model_len > self.blocks * self.block_size:
            raise ValueError(
                f"max_model_len {self.max_model_len} does not fit into {self.blocks} KV blocks of {self.block_size} "
                "tokens"
            )


@dataclass(eq=False)
class ScheduledSequence:
    """A request in the scheduler. `tokens` = prompt + generated; the first `computed` of them are in the KV cache."""

    request: GenerationRequest
    arrival: int
    tokens: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the leading full blocks, as far as they were needed
    cached_tokens: int = 0  # prompt tokens found in the prefix cache when the request was first admitted
    preemptions: int = 0
    admitted: bool = False

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.computed

    def key(self, index: int, block_size: int) -> bytes:
        """Key of the index-th block, all of whose tokens must be known."""
        while len(self.keys) <= index:
            begin = len(self.keys) * block_size
            prefill = min(max(self.prompt_length - begin, 0), block_size)
            parent = self.keys[-1] if self.keys else ROOT_KEY
            self.keys.append(block_key(parent, self.tokens[begin : begin + block_size], prefill))
        return self.keys[index]


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions start … start+count-1 of one sequence, all in one form. `sample`: the chunk ends with the
    last known token."""

    sequence: ScheduledSequence
    start: int
    count: int
    form: Form
    sample: bool


@dataclass(frozen=True)
class Sampled:
    """What the model gave for one sampling chunk."""

    token_id: int
    logprobs: TokenLogprobs | None = None


class Scheduler:
    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.blocks = BlockManager(config.blocks, config.block_size)
        self.waiting: deque[ScheduledSequence] = deque()
        self.running: list[ScheduledSequence] = []  # in order of arrival
        self._by_id: dict[str, ScheduledSequence] = {}
        self._arrivals = 0
        self.preemptions = 0

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
        if len(request.prompt) >= self.config.max_model_len:
            raise ValueError(
                f"prompt has {len(request.prompt)} tokens; at most {self.config.max_model_len - 1} leave room for an "
                "output token"
            )
        room = min(request.params.max_tokens, self.config.max_model_len - len(request.prompt))
        if len(request.generated) >= room:
            raise ValueError(
                f"request {request.id} resumes after {len(request.generated)} output tokens, "
                f"of which it may have only {room}"
            )
        most = None if self.config.max_waiting is None else self.config.max_sequences + self.config.max_waiting
        if most is not None and len(self._by_id) >= most and not (request.accepted or request.generated):
            raise QueueFullError(f"{len(self._by_id)} requests are running or waiting here, and {most} may")
        sequence = ScheduledSequence(request, self._arrivals, [*request.prompt, *request.generated])
        self._arrivals += 1
        self._by_id[request.id] = sequence
        self.waiting.append(sequence)

    def abort(self, request_id: str) -> bool:
        """Forget a request and free its blocks. False where it is not here (any more)."""
        sequence = self._by_id.pop(request_id, None)
        if sequence is None:
            return False
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        return True

    def fail(self, request_id: str, why: str) -> list[Delta]:
        """Forget a request that cannot go on, and say so; nothing where it is not here."""
        sequence = self._by_id.get(request_id)
        if sequence is None or not self.abort(request_id):
            return []
        return [Delta(request_id, sequence.generated, finish_reason=FinishReason.ERROR, error=why)]

    def request_ids(self) -> list[str]:
        return list(self._by_id)

    # --- a step -----------------------------------------------------------------------------------

    def schedule(self) -> list[Chunk]:
        """The next step's chunks, decode form first; empty when there is nothing to do."""
        budget = self.config.max_batch_tokens
        chunks: list[Chunk] = []
        for sequence in [s for s in self.running if s.remaining == 1 and s.computed >= s.prompt_length]:
            if budget > 0 and sequence in self.running and self._reserve(sequence, 1):
                chunks.append(self._chunk(sequence, 1))
                budget -= 1
        for sequence in [s for s in self.running if s.remaining > 1 or s.computed < s.prompt_length]:
            if budget > 0 and sequence in self.running:
                count = self._next_count(sequence, budget)
                if self._reserve(sequence, count):
                    chunks.append(self._chunk(sequence, count))
                    budget -= count
        # A later reservation may have preempted an earlier one's sequence
        chunks = [c for c in chunks if c.sequence in self.running]
        while budget > 0 and self.waiting and len(self.running) < self.config.max_sequences:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            chunks.append(admitted)
            budget -= admitted.count
        return sorted(chunks, key=lambda c: c.form is Form.PREFILL)

    def _next_count(self, sequence: ScheduledSequence, budget: int) -> int:
        until = sequence.prompt_length if sequence.computed < sequence.prompt_length else len(sequence.tokens)
        return min(until - sequence.computed, budget)

    def _chunk(self, sequence: ScheduledSequence, count: int) -> Chunk:
        form = Form.PREFILL if sequence.computed < sequence.prompt_length else Form.DECODE
        return Chunk(sequence, sequence.computed, count, form, sample=count == sequence.remaining)

    def _blocks_for(self, sequence: ScheduledSequence, tokens: int) -> int:
        return -(-tokens // self.config.block_size) - len(sequence.blocks)

    def _reserve(self, sequence: ScheduledSequence, count: int) -> bool:
        """Blocks for `count` more tokens, preempting what came later; False where `sequence` itself had to give way."""
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
        """Take a running request's blocks; it waits at the head of the queue to be recomputed."""
        sequence = self._by_id[request_id]
        self.running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.blocks, sequence.computed = [], 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _admit(self, sequence: ScheduledSequence, budget: int) -> Chunk | None:
        size = self.config.block_size
        if self.config.prefix_cache:
            # The last token is always computed: its logits are needed.
            full = (len(sequence.tokens) - 1) // size
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
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
        self.waiting.popleft()
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        return self._chunk(sequence, count)

    def complete(self, chunks: Iterable[Chunk], sampled: Sequence[Sampled]) -> list[Delta]:
        """Take a step's results, one `Sampled` per sampling chunk in order, and give what is new for each request."""
        results = iter(sampled)
        deltas = []
        for chunk in chunks:
            sequence = chunk.sequence
            result = next(results) if chunk.sample else None
            if sequence not in self.running:
                continue  # aborted or preempted while the step was computed: its blocks are no longer its own
            sequence.computed += chunk.count
            if self.config.prefix_cache:
                self._register_full_blocks(sequence, chunk.start)
            if result is not None:
                deltas.append(self._append(sequence, result))
        return deltas

    def _register_full_blocks(self, sequence: ScheduledSequence, start: int) -> None:
        size = self.config.block_size
        for index in range(start // size, sequence.computed // size):
            self.blocks.register(sequence.blocks[index], sequence.key(index, size))

    def _append(self, sequence: ScheduledSequence, result: Sampled) -> Delta:
        request, index = sequence.request, sequence.generated
        sequence.tokens.append(result.token_id)
        reason = None
        if result.token_id in request.params.stop_token_ids:
            reason = FinishReason.STOP
        elif sequence.generated >= request.params.max_tokens or len(sequence.tokens) >= self.config.max_model_len:
            reason = FinishReason.LENGTH
        if reason is not None:
            self.abort(request.id)
        return Delta(
            request.id,
            index,
            (result.token_id,),
            reason,
            () if result.logprobs is None else (result.logprobs,),
            sequence.cached_tokens,
        )
