"""One request on its way over attention shards: what was given out, and what was lost under it. Pure."""

from __future__ import annotations

from dataclasses import replace

from isotherm.cluster.messages.requests import Course, Delta, FinishReason, GenerationRequest

LOSSES = FinishReason.LOST, FinishReason.MISSED


class Journey:
    """Takes the deltas of one shard after the other. A request under which a shard was lost is suspect until it has a
    new token, or new scores of its prompt. Where the shard may have been dead before (MISSED), that counts for no more:
    no such loss brings its end nearer. It comes to one of them at most, for suspects are sent only to shards that have
    just answered (`Connection`)."""

    def __init__(self, request: GenerationRequest):
        self._request = request
        self._given = list(request.generated)
        self._scored = request.scored  # prompt tokens whose log-probabilities were given out
        self._moved = False  # a shard had it before
        self.moves = self.resumptions = 0  # times that a shard gave it back, and that one was lost under it
        # In succession, without a token or a score in between: shards lost under it, and those of them that had it and
        # that it may be the only cause of
        self.losses_met = self.losses = 0
        # The last time that a shard was lost under it:
        self.lost_in_company = False
        self.lost_unheard = False  # before that shard had given a token or a score of it
        self._heard = False  # the shard that has it has given one

    @property
    def has_begun(self) -> bool:
        """The client has had a token of it."""
        return len(self._given) > len(self._request.generated)

    @property
    def tokens(self) -> int:
        return len(self._given)

    @property
    def is_suspect(self) -> bool:
        return self.losses_met > 0

    def resumed(self) -> GenerationRequest:
        """What the next shard is to be sent."""
        return self._request.resumed(tuple(self._given), self._scored) if self._moved else self._request

    def take(self, delta: Delta, in_company: bool = False) -> bool:
        """Whether the delta is the client's; where it is not, the request goes on at another shard. `in_company`: of a
        suspect beside other suspects, any of which may be the cause of a loss. Raises RuntimeError on a gap or a
        repeat, of tokens or of what scores the prompt."""
        if delta.finish_reason is FinishReason.LOST:
            self.losses = max(self.losses, 1) if in_company else self.losses + 1
        if delta.finish_reason in LOSSES:
            self.losses_met += 1
            self.lost_in_company, self.lost_unheard = in_company, not self._heard
            self.resumptions += 1
        if delta.finish_reason is FinishReason.MOVED:
            self.moves += 1
        if delta.finish_reason in (*LOSSES, FinishReason.MOVED):
            self._moved, self._heard = True, False
            return False
        request_id = self._request.id
        if delta.prompt is not None:
            due = self._scored + 1
            if delta.prompt.start != due:
                raise RuntimeError(
                    f"prompt token {delta.prompt.start} of request {request_id} came where {due} was due"
                )
            self._scored += len(delta.prompt.tokens)
            self._gets_on()
        if delta.token_ids:
            if delta.start != len(self._given):
                raise RuntimeError(f"token {delta.start} of request {request_id} came where {len(self._given)} was due")
            self._given += delta.token_ids
            self._gets_on()
        return True

    def _gets_on(self) -> None:
        self.losses_met = self.losses = 0
        self._heard = True

    def told(self, delta: Delta) -> Delta:
        """The delta as the client's side is to have it: with where the request has been, if it has been elsewhere."""
        if not self._moved:
            return delta
        return replace(delta, course=replace(delta.course or Course(), moved=self.moves, resumed=self.resumptions))

    def failure(self, why: str) -> Delta:
        """The end of a request that cannot go on."""
        return Delta(self._request.id, len(self._given), finish_reason=FinishReason.ERROR, error=why)

    @property
    def is_tried_alone(self) -> bool:
        """No other suspect may be at the next shard with it."""
        return self.lost_in_company or self.losses_met > 1

    def verdict(self, allowed: int) -> Delta | None:
        """The end of a request under which `allowed` shards were lost; None where it may go on."""
        if self.losses < allowed:
            return None
        return self.failure(
            f"{self.losses} attention shards in succession were lost while they computed this request; "
            "it is not tried again"
        )
