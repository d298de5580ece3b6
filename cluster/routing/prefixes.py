"""Which shard has the beginnings of which prompts in its prefix cache, as far as this replica has sent them there.

Pure, and a guess: what a shard has dropped since is not known, and a request that finds nothing there is computed as
any other."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from isotherm.cluster.messages.requests import GenerationRequest

GRAIN = 64  # tokens by which one beginning is longer than the next that is told apart
MOST = 65_536  # beginnings that are remembered, those that were asked last
# Shards that one is remembered at, those that were sent it last. Names are not used twice, so those of shards that have
# gone stay for as long.
HOLDERS = 16


class Prefixes:
    def __init__(self, most: int = MOST):
        self._most = most
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # digest of a beginning → names of shards

    def cached(self, request: GenerationRequest) -> dict[str, int]:
        """Tokens of the prompt that each shard should have, where that are any."""
        found: dict[str, int] = {}
        for tokens, digest in _beginnings(request):
            if (holders := self._holders.get(digest)) is None:
                break
            found |= dict.fromkeys(holders, tokens)
        return found

    def sent(self, request: GenerationRequest, shard: str) -> None:
        """The shard has, or will soon have, the beginnings of the prompt."""
        for _, digest in _beginnings(request):
            others = [name for name in self._holders.pop(digest, ()) if name != shard]
            self._holders[digest] = (*others, shard)[-HOLDERS:]
        while len(self._holders) > self._most:
            self._holders.popitem(last=False)


def _beginnings(request: GenerationRequest) -> Iterator[tuple[int, int]]:
    """Tokens and digest of each, the shortest first; those of one tenant are none of another's. The last token is in
    none: it is computed in any case."""
    digest = hash(request.tenant)
    for start in range(0, len(request.prompt) - GRAIN, GRAIN):
        digest = hash((digest, request.prompt[start : start + GRAIN]))
        yield start + GRAIN, digest
