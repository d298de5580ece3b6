"""One attention shard's engine: its scheduler, model, cache and sampler, advanced one step at a time. Knows nothing
about Ray or text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from isotherm.actors.attention.lost_experts import ExpertsFailedError, ExpertsLostError
from isotherm.actors.attention.prompt_scores import score_prompts
from isotherm.actors.attention.sampling import Sampler
from isotherm.actors.attention.step_figures import StepFigures
from isotherm.actors.models.protocol import AttentionModel, RoutedExperts
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.scheduler import Scheduler
from isotherm.cluster.engine.sequence import Chunk
from isotherm.cluster.engine.speculation import Speculation
from isotherm.cluster.errors import named_line
from isotherm.cluster.messages.requests import Delta, GenerationRequest

log = logging.getLogger(__name__)


class Engine:
    """`speculation`: what guesses the tokens that come next; None: nothing does."""

    def __init__(
        self,
        model: AttentionModel,
        experts: RoutedExperts,
        config: SchedulerConfig,
        speculation: Speculation | None = None,
        sampler: Sampler | None = None,
    ):
        self.model, self.experts, self.speculation = model, experts, speculation
        self.scheduler = Scheduler(config)
        self.sampler = sampler or Sampler(model.kernels)
        self.cache = model.new_cache(config.blocks, config.block_size)
        self.steps = self.failed = 0
        self.figures = StepFigures()
        self._unsent: list[Delta] = []  # what parts of a step gave before experts were lost that its rest needs

    def take_unsent(self) -> list[Delta]:
        """What a step that raised has given all the same."""
        unsent, self._unsent = self._unsent, []
        return unsent

    def prepare(self, request: GenerationRequest, then: Callable[[], None]) -> bool:
        """Whether something has to be made before a request is added, so that no step waits for it: it is made in
        another thread, which then calls `then`."""
        constraint, masks = request.params.constraint, self.sampler.masks
        if constraint is None or masks is None or masks.keep_if_ready(constraint):
            return False
        masks.compile(constraint, then)
        return True

    def step(self) -> list[Delta]:
        """Compute one step; what it gave each request. Empty when nothing is queued. A request that makes the
        computation fail is ended with an error, and the others go on. Raises ExpertsLostError, where experts that they
        need cannot be reached in time."""
        begin, waited = time.perf_counter(), self.experts.waited_seconds
        self.scheduler.waited = waited
        planned = self.scheduler.schedule()
        chunks: Sequence[Chunk] = planned
        another = False
        try:
            if self.speculation is not None and chunks and not self.speculation.sits_out():
                chunks, deltas = self._speculate(chunks, self.speculation)
            else:
                deltas = self._attempt(chunks) if chunks else []
            if chunks:
                seconds = time.perf_counter() - begin
                self.figures.add(chunks, seconds, self.experts.waited_seconds - waited)
                if self.scheduler.is_shared:
                    self.scheduler.took(planned, seconds)  # drafts are no work that was allowed for
            another = len(self.scheduler) > 0
            return deltas
        finally:
            if not another:
                self.experts.end_step()

    def _speculate(self, chunks: Sequence[Chunk], speculation: Speculation) -> tuple[Sequence[Chunk], list[Delta]]:
        """A step with drafts. A drafter that fails takes nobody's tokens: there are no more drafts, and status says
        why; or none for a while, where it is the experts of its layer that are not there."""
        config = self.scheduler.config
        patience, self.experts.patience = self.experts.patience, 0.0  # no stream waits for drafts
        try:
            chunks = speculation.extended(chunks, self.scheduler.blocks, config.max_batch_tokens, config.max_model_len)
        except (ExpertsLostError, ExpertsFailedError) as error:
            self._pause(speculation, error)
        except Exception as error:
            self._stop(speculation, error)
        finally:
            self.experts.patience = patience
        failed = self.failed
        deltas = self._attempt(chunks)
        if self.failed == failed:
            speculation.completed(chunks)
        return chunks, deltas

    def _pause(self, speculation: Speculation, error: Exception) -> None:
        steps = speculation.pause(f"no drafts for now: {named_line(error)}")
        log.warning("there are no drafts for %d steps: %s", steps, named_line(error))
        self.experts.abandon()

    def _stop(self, speculation: Speculation, error: Exception) -> None:
        log.exception("drafting failed; there are no drafts from now on")
        speculation.stop(f"drafting failed: {named_line(error)}")
        self.experts.abandon()

    def _attempt(self, chunks: Sequence[Chunk]) -> list[Delta]:
        try:
            return self._compute(chunks)
        except ExpertsLostError:
            raise
        except Exception as error:
            log.exception("a step of %d requests failed; the one that is the cause is looked for", len(chunks))
            self.failed += 1
            self.experts.finding_fault = True
            try:
                return self._isolate(chunks, error)
            finally:
                self.experts.finding_fault = False

    def _isolate(self, chunks: Sequence[Chunk], error: Exception) -> list[Delta]:
        """Compute the halves of chunks that failed together, and their halves: what a row gives does not depend on its
        batch."""
        if len(chunks) == 1:
            return self.scheduler.fail(chunks[0].sequence.request.id, named_line(error))
        deltas = []
        middle = len(chunks) // 2
        for half in (chunks[:middle], chunks[middle:]):
            try:
                deltas += self._compute_or_isolate(half)
            except ExpertsLostError:
                self._unsent += deltas
                raise
        return deltas

    def _compute_or_isolate(self, chunks: Sequence[Chunk]) -> list[Delta]:
        try:
            return self._compute(chunks)
        except ExpertsLostError:
            raise
        except Exception as error:
            return self._isolate(chunks, error)

    @torch.inference_mode()
    def _compute(self, chunks: Sequence[Chunk]) -> list[Delta]:
        self.experts.begin_step()
        self.sampler.begin(chunks)
        batch = build_batch(chunks, self.scheduler.config.block_size, self.model.cos, self.model.sin)
        try:
            x_TD = self.model.forward(batch, self.cache, self.experts)
        except BaseException:
            self.experts.abandon()
            raise
        self.steps += 1
        scored = score_prompts(chunks, x_TD, self.model.logits)
        sampled = self.sampler.sample(chunks, self.model.logits(batch.sampled(x_TD)))
        deltas = self.scheduler.complete(chunks, sampled, scored)
        if self.speculation is not None and self.speculation.listens:
            self._tell_drafter(chunks, x_TD, self.speculation)
        return deltas

    def _tell_drafter(self, chunks: Sequence[Chunk], x_TD: Tensor, speculation: Speculation) -> None:
        """The tokens are taken: what fails now may not fail them."""
        try:
            speculation.drafter.computed(chunks, x_TD)
        except Exception as error:
            self._stop(speculation, error)
