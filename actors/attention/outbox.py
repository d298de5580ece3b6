"""Deltas on their way from the step loop to the ingress replicas: who gets what, and when. Pure but for the clock that
it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from isotherm.cluster.messages.requests import Delta, FinishReason, PromptLogprobs

FLUSH = 0.01  # seconds between two lists of deltas to one ingress replica, at least
# Seconds between two of them where many streams share the machine; a reader sees text flow all the same.
LONGEST_FLUSH = 0.04
FEW_STREAMS = 4  # up to so many, nothing waits longer than FLUSH
_SEEN = (None, FinishReason.STOP, FinishReason.LENGTH)  # reasons that the client is told


def flush_interval(streams: int) -> float:
    """Seconds between two lists that bring tokens of so many streams. A chunk costs the front door about the same
    however many tokens are in it, so with more streams they come less often, with more tokens in each."""
    return min(LONGEST_FLUSH, FLUSH * max(1.0, streams / FEW_STREAMS))


class Outbox:
    """What one ingress replica has not been sent yet. First tokens, and all that ends a stream, wait for no more than
    FLUSH."""

    def __init__(self) -> None:
        self._waiting: list[Delta] = []
        self._urgent = False
        self._sent = float("-inf")
        self._interval = FLUSH  # of the streams that were in the last list and go on

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, deltas: Sequence[Delta]) -> None:
        self._waiting += deltas
        self._urgent = self._urgent or is_urgent(deltas)

    def worth_a_look(self) -> float:
        """When (seconds) something is likely to be due: tokens of the streams that had some in the last list."""
        return self._sent + (FLUSH if self._urgent else self._interval)

    def due(self, now: float) -> list[Delta]:
        """What is to be sent at `now` (seconds), joined; empty where there is nothing, or where it can wait."""
        if not self._waiting:
            return []
        least = FLUSH if self._urgent else flush_interval(len({delta.request_id for delta in self._waiting}))
        if now < self._sent + least - FLUSH / 10:  # timers may be a little early
            return []
        deltas, self._waiting, self._urgent, self._sent = merged_deltas(self._waiting), [], False, now
        ended = {delta.request_id for delta in deltas if delta.finish_reason is not None}
        self._interval = flush_interval(len({delta.request_id for delta in deltas} - ended))
        return deltas


def is_urgent(deltas: Iterable[Delta]) -> bool:
    """Whether a first token is among them, or the end of a stream."""
    return any(delta.start == 0 or delta.finish_reason is not None for delta in deltas)


def merged_deltas(deltas: Iterable[Delta]) -> list[Delta]:
    """The same with fewer deltas: tokens that follow each other in one request come in one. A reason that the client
    does not see stays apart."""
    runs: list[list[Delta]] = []
    # Request → its last run, and the index of the token that would follow it
    last: dict[str, tuple[list[Delta], int]] = {}
    for delta in deltas:
        found = last.get(delta.request_id)
        end = delta.start + len(delta.token_ids)
        if (
            found is not None
            and found[1] == delta.start
            and delta.finish_reason in _SEEN
            and found[0][-1].finish_reason is None
        ):
            found[0].append(delta)
            last[delta.request_id] = found[0], end
        else:
            runs.append(run := [delta])
            last[delta.request_id] = run, end
    return [run[0] if len(run) == 1 else _joined(run) for run in runs]


def _joined(run: list[Delta]) -> Delta:
    tokens = tuple(token for delta in run for token in delta.token_ids)
    logprobs = tuple(logprob for delta in run for logprob in delta.logprobs)
    reason, prompt = run[-1].finish_reason, _joined_prompt(run)
    course = next((delta.course for delta in reversed(run) if delta.course is not None), None)
    right, wrong = (sum(getattr(delta, name) for delta in run) for name in ("drafts_accepted", "drafts_rejected"))
    joined = replace(run[0], token_ids=tokens, logprobs=logprobs, finish_reason=reason, prompt=prompt, course=course)
    return replace(joined, drafts_accepted=right, drafts_rejected=wrong) if right or wrong else joined


def _joined_prompt(run: Iterable[Delta]) -> PromptLogprobs | None:
    parts = [delta.prompt for delta in run if delta.prompt is not None]
    if not parts:
        return None
    return PromptLogprobs(parts[0].start, tuple(one for part in parts for one in part.tokens))
