"""Which documents a step of a training run takes, and where they come from: drawn when the step wants them, or ahead of
it by processes of their own, for a device that takes less time for a step than a core does for its documents."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection
from typing import Any

import numpy
import torch
from batches import CONTEXT, LONG, MIDDLE, SHORT, Lengths, Packed, Stream
from mix import Mix
from tokenizers import Tokenizer

MIDDLE_EVERY, LONG_EVERY = 3, 24  # every so many steps take documents of these lengths, the others short ones
AHEAD = 48  # steps that batches are asked for ahead of


def documents_of(number: int) -> tuple[Lengths, int | None]:
    """What documents step `number`, from 1 on, takes, and the length of its rows where they are one context."""
    if number % LONG_EVERY == 0:
        return LONG, CONTEXT if number // LONG_EVERY % 2 == 0 else None
    return (MIDDLE if number % MIDDLE_EVERY == 0 else SHORT), None


class Streams:
    """Drawn when it is asked for. `size`: tokens of a batch."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mix: Mix, size: int):
        self._size = size
        self._streams = {
            lengths.row: Stream(tokenizer, seed + lengths.row, mix, lengths=lengths)
            for lengths in (SHORT, MIDDLE, LONG)
        }

    def batch(self, number: int) -> Packed:
        lengths, context = documents_of(number)
        return self._streams[lengths.row].batch(context, self._size)

    def state(self) -> Any:
        return {row: stream.state() for row, stream in self._streams.items()}

    def restore(self, state: Any) -> None:
        for row, stream in self._streams.items():
            stream.restore(state[row])


class Loaders:
    """`count` processes, each with streams of its own. A batch is drawn by the mix as it was AHEAD steps before."""

    def __init__(self, tokenizer: Tokenizer, seed: int, mix: Mix, size: int, count: int):
        self._mix = mix
        self._asked = self._last = 0  # the last steps that a batch was asked for, and given to
        self._drawn: dict[int, Packed] = {}  # those that have come, in the order of steps
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for i in range(count):
            ours, theirs = context.Pipe()
            arguments = theirs, tokenizer.to_str(), seed + 10_000 * (i + 1), size
            context.Process(target=_serve, args=arguments, daemon=True).start()
            self._pipes.append(ours)

    def batch(self, number: int) -> Packed:
        """Of step `number`, the one after that of the call before."""
        self._asked = max(self._asked, number - 1)
        while self._asked < number + AHEAD:
            self._asked += 1
            self._loader(self._asked).send(dict(wrong=dict(self._mix.wrong), more=self._mix.more, number=self._asked))
        if number not in self._drawn:
            self._take(number)
        self._last = number
        return self._drawn.pop(number)

    def state(self) -> Any:
        """What is under way is waited for, and kept."""
        for number in range(self._last + 1, self._asked + 1):
            if number not in self._drawn:
                self._take(number)
        streams = []
        for pipe in self._pipes:
            pipe.send({})
            streams.append(pipe.recv())
        return dict(drawn={number: tuple(batch) for number, batch in self._drawn.items()}, streams=streams)

    def restore(self, state: Any) -> None:
        """Raises ValueError where there were not as many loaders."""
        if len(state["streams"]) != len(self._pipes):
            raise ValueError(f"the run has {len(state['streams'])} loaders, not {len(self._pipes)}")
        self._drawn = {number: Packed(*batch) for number, batch in state["drawn"].items()}
        self._asked, self._last = max(self._drawn, default=0), min(self._drawn, default=1) - 1
        for pipe, streams in zip(self._pipes, state["streams"], strict=True):
            pipe.send(dict(streams=streams))

    def _take(self, number: int) -> None:
        self._drawn[number] = Packed(*map(_tensor, self._loader(number).recv()))

    def _loader(self, number: int) -> Connection:
        """Long documents are rare among those that are drawn, so that a quarter of all loaders has them alone."""
        some = len(self._pipes) // 4
        if documents_of(number)[0] is LONG and some:
            return self._pipes[number // LONG_EVERY % some]
        return self._pipes[some + number % (len(self._pipes) - some)]


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, numpy.ndarray) else value


def _serve(pipe: Connection, tokenizer: str, seed: int, size: int) -> None:
    """A loader's process: batches of the steps that it is asked for, its streams' state, or another state."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    mix = Mix()
    streams = Streams(Tokenizer.from_str(tokenizer), seed, mix, size)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        if "number" in asked:
            mix.wrong, mix.more = asked["wrong"], asked["more"]
            pipe.send(tuple(x.numpy() if isinstance(x, torch.Tensor) else x for x in streams.batch(asked["number"])))
        elif "streams" in asked:
            streams.restore(asked["streams"])
        else:
            pipe.send(streams.state())
