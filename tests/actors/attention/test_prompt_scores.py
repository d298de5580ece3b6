"""Log-probabilities of prompt tokens: those of the model's forward pass, to the same bits whatever is around them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from deepseek_checkpoints import make_checkpoint

from isotherm.actors.attention import prompt_scores
from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.prompt_scores import row_scores
from isotherm.actors.local import local_engine, run
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams, TokenLogprobs
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.kernels.reference import ReferenceKernels

RNG = random.Random(5)
PROMPT = tuple(RNG.randrange(256) for _ in range(70))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=3))


def engine(checkpoint: Checkpoint, budget: int = 512, **config: int) -> Engine:
    asked = {"block_size": 4, "blocks": 64, "max_batch_tokens": budget, "max_sequences": 8, "max_model_len": 128}
    return local_engine(checkpoint, ReferenceKernels(torch.float32), SchedulerConfig(**{**asked, **config}))


def asked(name: str = "a", top: int = 3, max_tokens: int = 4, prompt: tuple[int, ...] = PROMPT) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens, prompt_logprobs=top))


def scored(engine: Engine, *requests: GenerationRequest) -> dict[str, list[TokenLogprobs]]:
    out: dict[str, list[TokenLogprobs]] = {request.id: [] for request in requests}
    for delta in run(engine, requests):
        if delta.prompt is not None:
            out[delta.request_id] += delta.prompt.tokens
    return out


def test_scores_are_those_of_the_forward_pass(checkpoint: Checkpoint):
    one = engine(checkpoint)
    sequence = ScheduledSequence(asked(), 0, list(PROMPT), blocks=list(range(18)))
    chunk = Chunk(sequence, 0, len(PROMPT), Form.PREFILL, sample=False)
    batch = build_batch([chunk], 4, one.model.cos, one.model.sin)
    logprobs = one.model.logits(one.model.forward(batch, one.cache, one.experts)).log_softmax(-1)
    found = scored(engine(checkpoint), asked())["a"]
    assert len(found) == len(PROMPT) - 1
    for row, token, score in zip(logprobs, PROMPT[1:], found, strict=False):
        assert score.chosen == pytest.approx(float(row[token]), abs=1e-5)
        assert score.rank == 1 + int((row > row[token]).sum())
        assert [id_ for id_, _ in score.top] == row.topk(3).indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-5)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_neither_chunks_nor_slices_nor_other_requests_change_them(
    checkpoint: Checkpoint, budget: int, monkeypatch: pytest.MonkeyPatch
):
    alone = scored(engine(checkpoint), asked())["a"]
    monkeypatch.setattr(prompt_scores, "SLICE_ROWS", 5)
    others = [asked("b", 0, prompt=PROMPT[:33]), GenerationRequest("c", PROMPT[5:40], SamplingParams(9))]
    warm = engine(checkpoint, budget)
    for _ in range(2):  # the second time over a warm prefix cache
        found = scored(warm, others[0], asked(), others[1])
        same = [s.chosen == pytest.approx(o.chosen, abs=1e-4) for s, o in zip(found["a"], alone, strict=True)]
        assert all(same) and [s.rank for s in found["a"]] == [o.rank for o in alone]
        assert [s.chosen for s in found["b"]] == pytest.approx([o.chosen for o in alone[:32]], abs=1e-4)
        assert all(not s.top for s in found["b"]) and found["c"] == []


def test_logits_of_a_long_prompt_are_never_there_all_at_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    rows = []
    one = engine(checkpoint)
    logits = one.model.logits
    monkeypatch.setattr(one.model, "logits", lambda x_ND: (rows.append(len(x_ND)), logits(x_ND))[1])
    scored(one, asked(max_tokens=0))
    assert sum(rows) == len(PROMPT) - 1 and max(rows) <= prompt_scores.SLICE_ROWS < len(PROMPT) - 1


def test_a_row_is_scored_by_itself():
    """To the bit, in a slice of any size."""
    logits = torch.randn(50, 5000, generator=torch.Generator().manual_seed(1)) * 4
    tokens = [RNG.randrange(5000) for _ in range(50)]
    together = row_scores(logits, tokens, 5)
    assert together == [row_scores(logits[i : i + 1], tokens[i : i + 1], 5)[0] for i in range(50)]
    likeliest = row_scores(logits, logits.argmax(-1).tolist(), 1)
    assert all(score.rank == 1 and score.top[0][1] == score.chosen for score in likeliest)


def test_a_prompt_alone_gives_no_token_and_a_prompt_of_one_token_no_score(checkpoint: Checkpoint, tmp_path: Path):
    deltas = list(run(engine(checkpoint), [asked(max_tokens=0), asked("b", prompt=(5,), max_tokens=0)]))
    assert [token for delta in deltas for token in delta.token_ids] == []
    assert {d.request_id for d in deltas if d.finish_reason} == {"a", "b"}
    assert all(d.prompt is None for d in deltas if d.request_id == "b")
