"""Drafts by the bundled model's own multi-token-prediction layer: mostly right, whatever happened to a stream before;
that they change no token is tests/exactness'."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from family_checkpoints import make_family
from grammars import tiny_tokenizer
from stated_mtp import Stated, loaded

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.lost_experts import ExpertsLostError
from isotherm.actors.attention.mtp_drafter import WINDOW, MtpDrafter, Run
from isotherm.actors.local import local_engine, run
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.engine.speculation import PAUSE
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.path import bundled_model
from isotherm.kernels.select import select_kernels

pytestmark = pytest.mark.slow

CONFIG = SchedulerConfig(block_size=16, blocks=64, max_batch_tokens=64, max_sequences=4, max_model_len=512)


def make(speculation: str, config: SchedulerConfig = CONFIG, groups: int = 1) -> Engine:
    kernels = select_kernels("auto", torch.bfloat16).kernels
    engine = local_engine(Checkpoint.open(bundled_model()), kernels, config, groups, speculation=speculation)
    if engine.speculation is not None:
        engine.speculation.lengths = None  # always as many as there can be
    return engine


@pytest.fixture(scope="module")
def plain() -> Engine:
    return make("off")


@pytest.fixture(scope="module")
def drafting() -> Engine:
    return make("auto")


def story(name: str, of: str, **params) -> GenerationRequest:
    prompt = tiny_tokenizer().encode_chat([{"role": "user", "content": f"Tell me a story about a {of}."}]).ids
    return GenerationRequest(name, tuple(prompt), SamplingParams(64, **{"temperature": 0.0, **params}))


def outputs(engine: Engine, *requests: GenerationRequest) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {request.id: list(request.generated) for request in requests}
    for delta in run(engine, requests):
        out[delta.request_id] += delta.token_ids
    assert engine.scheduler.blocks.used == 0
    return out


def first_rate(engine: Engine, *requests: GenerationRequest) -> float:
    """Of first drafts, how many are right."""
    assert engine.speculation is not None
    before = engine.speculation.meter()
    outputs(engine, *requests)
    after = engine.speculation.meter()
    return (after.accepted[0] - before.accepted[0]) / (after.tried[0] - before.tried[0])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_most_first_drafts_are_right(plain: Engine, drafting: Engine, temperature: float):
    """Sampled ones too, for they are drawn with the noise of their place."""
    asked = [story(f"{i}", of, temperature=temperature, seed=i) for i, of in enumerate(("fox", "boat", "river"))]
    before = drafting.steps
    assert outputs(drafting, *asked) == outputs(plain, *asked)
    assert drafting.steps - before < 50  # for 64 tokens
    rates = [first_rate(drafting, story("again", "dog", temperature=temperature, seed=seed)) for seed in range(3)]
    assert sum(rates) / 3 > 0.75


def test_a_prefix_from_the_cache_brings_its_entries(drafting: Engine):
    request = story("a", "fox")
    told = outputs(drafting, request)["a"]
    longer = GenerationRequest("b", (*request.prompt, *told[:40]), request.params)
    outputs(drafting, longer)
    drafting.scheduler.add(longer)
    drafting.step()
    (sequence,) = drafting.scheduler.running
    found = sequence.drafting
    drafting.scheduler.abort("b")
    assert sequence.cached_tokens == 48 and isinstance(found, Run)
    assert found.begin == 0 and found.end == 48 == found.held_from


def test_a_stream_that_gave_way_drafts_again(plain: Engine, drafting: Engine):
    request = story("a", "fox")
    expected = outputs(plain, request)["a"]
    drafting.scheduler.add(request)
    got = [token for _ in range(6) for delta in drafting.step() for token in delta.token_ids]
    drafting.scheduler.preempt("a")
    before = drafting.speculation.meter()  # type: ignore[union-attr]
    while len(drafting.scheduler):
        got += [token for delta in drafting.step() for token in delta.token_ids]
    after = drafting.speculation.meter()  # type: ignore[union-attr]
    assert got == expected
    assert after.accepted[0] - before.accepted[0] > 0.6 * (after.tried[0] - before.tried[0]) > 0


def test_a_stream_that_comes_from_elsewhere_drafts(plain: Engine, drafting: Engine):
    request = story("a", "fox")
    expected = outputs(plain, request)["a"]
    moved = request.resumed(tuple(expected[:20]))
    assert outputs(drafting, moved)["a"] == expected
    assert first_rate(drafting, moved) > 0.6


def test_after_steps_without_drafts_a_run_begins_late(plain: Engine, drafting: Engine):
    """With what was kept of the last positions, from a block on."""
    assert drafting.speculation is not None
    request = story("a", "fox")
    expected = outputs(plain, request)["a"]
    drafter = drafting.speculation.drafter
    room, drafter.most = drafter.most, lambda sequence, room: 0  # type: ignore[method-assign]
    drafting.scheduler.add(request)
    got = [token for _ in range(30) for delta in drafting.step() for token in delta.token_ids]
    drafter.most = room  # type: ignore[method-assign]
    before = drafting.speculation.meter()
    while len(drafting.scheduler):
        got += [token for delta in drafting.step() for token in delta.token_ids]
    after = drafting.speculation.meter()
    assert got == expected
    assert after.accepted[0] - before.accepted[0] > 0.6 * (after.tried[0] - before.tried[0]) > 0


def test_its_experts_are_on_groups_like_all_others(plain: Engine):
    engine = make("mtp", groups=3)
    asked = story("a", "fox")
    assert outputs(engine, asked) == outputs(plain, asked)
    layer = Checkpoint.open(bundled_model()).config.num_hidden_layers
    assert engine.experts.placement.layers[-1] == layer  # type: ignore[attr-defined]
    assert engine.experts.rows_routed[-1].sum() > 0  # type: ignore[attr-defined]


def test_a_drafter_that_fails_ends_no_stream(plain: Engine, caplog: pytest.LogCaptureFixture):
    engine = make("mtp")
    assert engine.speculation is not None

    def fail(*_: object) -> None:
        raise ValueError("a layer of nothing")

    engine.speculation.drafter._guess = fail  # type: ignore[attr-defined]
    asked = story("a", "fox")
    assert outputs(engine, asked) == outputs(plain, asked)
    assert "a layer of nothing" in engine.speculation.meter().why
    assert "there are no drafts from now on" in caplog.text


def test_a_request_may_want_none(plain: Engine, drafting: Engine):
    assert drafting.speculation is not None
    before = drafting.speculation.meter()
    asked = story("a", "fox", speculate=False)
    assert outputs(drafting, asked) == outputs(plain, asked)
    assert drafting.speculation.meter().drafted == before.drafted


def test_rows_for_which_a_pass_has_no_room_wait(plain: Engine):
    """More streams than one pass has rows for, and none is lost."""
    config = SchedulerConfig(block_size=16, blocks=256, max_batch_tokens=20, max_sequences=16, max_model_len=128)
    engine = make("mtp", config)
    asked = [story(f"{i}", of) for i, of in enumerate(("fox", "boat", "river", "dog", "lamp", "horse", "bridge") * 2)]
    assert outputs(engine, *asked) == outputs(plain, *asked)
    assert engine.speculation is not None and not engine.speculation.stopped
    assert engine.speculation.meter().accepted[0] > 50


def test_a_stream_goes_on_where_the_experts_of_the_layer_are_lost(plain: Engine):
    engine = make("mtp", groups=2)
    layer, moe = engine.model.config.num_hidden_layers, engine.experts.moe

    def lose(at: int, *rest: Any) -> Any:
        if at >= layer:
            raise ExpertsLostError(f"layer {at}: nobody holds expert 3")
        return moe(at, *rest)

    engine.experts.moe = lose  # type: ignore[method-assign]
    asked = [story("a", "cat"), story("b", "dog")]
    assert outputs(engine, *asked) == outputs(plain, *asked)
    assert engine.speculation is not None and "nobody holds expert 3" in engine.speculation.stopped


def test_no_more_rows_are_kept_than_can_be_needed():
    held = Run(0, 0, 0, 0, 0)
    step_TD = torch.arange(500.0)[:, None]
    held.hold(step_TD, 10, 400)
    held.hold(step_TD, 490, 3)
    assert (held.held_from, held.held_to) == (400 - WINDOW, 403)
    assert all(rows_TD is not step_TD and len(rows_TD) <= WINDOW for rows_TD, _, _ in held.held)
    first, parts = held.take(WINDOW, 16) or (0, [])
    rows_TD = torch.cat([x_TD[row : row + count] for x_TD, row, count in parts])
    assert first % 16 == 0 and rows_TD[:, 0].tolist() == [*range(10 + first, 410), 490, 491, 492]


def test_a_dense_layer_asks_nothing_of_the_experts(tmp_path: Path):
    """JoyAI-LLM-Flash's: groups that were told of a step would wait for rows that do not come."""
    path = make_family(tmp_path, "joyai_llm_flash", {"n_group": 1, "topk_group": 1}, mtp=True)
    kernels = select_kernels("auto", torch.bfloat16).kernels
    plain, engine = (
        local_engine(Checkpoint.open(path), kernels, CONFIG, 2, speculation=kind) for kind in ("off", "mtp")
    )
    assert engine.speculation is not None
    engine.speculation.lengths = None
    begun = []

    def begin_step() -> None:
        begun.append(engine.steps)

    engine.experts.begin_step = begin_step  # type: ignore[method-assign]
    asked = GenerationRequest("a", tuple(range(5, 40)), SamplingParams(24, temperature=0.0))
    assert outputs(engine, asked) == outputs(plain, asked)
    assert engine.speculation.meter().tried[0] > 0 and not engine.speculation.stopped
    assert len(begun) == len(set(begun)) == engine.steps
    assert list(engine.experts.placement.layers) == [1, 2]  # type: ignore[attr-defined]


def test_drafts_come_again_after_the_experts_of_the_layer_were_lost(plain: Engine):
    """In the same stream, and nobody waits for them meanwhile."""
    engine = make("mtp", groups=2)
    speculation, layer, moe = engine.speculation, engine.model.config.num_hidden_layers, engine.experts.moe
    patience, lost = engine.experts.patience, list[float]()
    assert speculation is not None and patience > 0

    def lose_once(at: int, *rest: Any) -> Any:
        if at >= layer and not lost:
            lost.append(engine.experts.patience)
            raise ExpertsLostError(f"layer {at}: nobody holds expert 3")
        return moe(at, *rest)

    engine.experts.moe = lose_once  # type: ignore[method-assign]
    asked = story("a", "cat")
    asked = replace(asked, params=replace(asked.params, max_tokens=PAUSE + 100))
    expected, got = outputs(plain, asked)["a"], list[int]()
    engine.scheduler.add(asked)
    for _ in range(PAUSE):
        got += [token for delta in engine.step() for token in delta.token_ids]
        assert not speculation.drafted and speculation.meter().gain == 1.0
    assert "nobody holds expert 3" in speculation.meter().why
    got += [token for delta in run(engine, ()) for token in delta.token_ids]
    assert got == expected and lost == [0.0] and engine.experts.patience == patience
    assert not speculation.stopped and speculation.drafted > 0
    assert first_rate(engine, story("b", "fox")) > 0.6


def test_blocks_that_are_larger_than_the_window_keep_no_drafts_away():
    engine = make("mtp", replace(CONFIG, block_size=128, blocks=8, max_batch_tokens=128))
    engine.scheduler.add(GenerationRequest("a", tuple(range(300, 400)), SamplingParams(8, temperature=0.0)))
    engine.step()
    engine.step()
    assert engine.speculation is not None and engine.speculation.drafted == 4


def test_a_stream_for_which_the_layer_can_begin_nowhere_is_not_asked_for_drafts():
    """A pass has room for fewer rows than a block has positions."""
    engine = make("mtp", replace(CONFIG, block_size=128, blocks=8, max_batch_tokens=16))
    engine.scheduler.add(GenerationRequest("a", tuple(range(300, 340)), SamplingParams(8, temperature=0.0)))
    for _ in range(4):
        engine.step()
    (sequence,) = engine.scheduler.running
    assert engine.speculation is not None and engine.speculation.drafter.most(sequence, 4) == 0
    assert engine.speculation.drafted == 0


def test_a_block_that_is_written_over_holds_nobodys_prefix():
    engine = make("mtp", replace(CONFIG, blocks=8, max_model_len=128))
    assert engine.speculation is not None
    outputs(engine, story("a", "fox"))
    written, looked = engine.speculation.drafter._written, 0  # type: ignore[attr-defined]
    assert len(written) >= 4
    engine.scheduler.add(story("b", "dog"))
    while len(engine.scheduler):
        engine.step()
        for sequence in engine.scheduler.running:
            found = sequence.drafting
            assert isinstance(found, Run)
            if found.end % CONFIG.block_size:
                looked += 1
                assert sequence.blocks[found.end // CONFIG.block_size] not in written
    assert looked > 10


def test_a_draft_of_several_tokens_is_what_the_layer_says_of_what_it_says(tmp_path: Path):
    """Beside the statement in plain torch, for two streams in one call: after a prompt, after more of it, and after a
    step whose drafts were wrong."""
    make_checkpoint(tmp_path, {"vocab_size": 200}, dtype="float32", mtp=True)
    (model, experts), stated = loaded(tmp_path), Stated(tmp_path)
    assert model.mtp is not None
    config = replace(CONFIG, block_size=4, max_model_len=64)
    drafter = MtpDrafter(model.mtp, experts, config)
    rng = torch.Generator().manual_seed(5)
    made = []  # of each stream: itself, its tokens, the main model's output for them, how many drafts it wants
    for name, first_block, wanted in (("a", 0, 4), ("b", 9, 2)):
        tokens = torch.randint(200, (31,), generator=rng)
        output_TD = torch.randn(30, stated.config.hidden_size, generator=rng)
        request = GenerationRequest(name, tuple(tokens[:13].tolist()), SamplingParams(20, temperature=0.0))
        sequence = ScheduledSequence(request, 0, [], running=True, blocks=list(range(first_block, first_block + 9)))
        made.append((sequence, tokens, output_TD, wanted))
    for begin, end, form in ((0, 13, Form.PREFILL), (13, 15, Form.DECODE), (15, 30, Form.PREFILL)):
        chunks, rows = [], []
        for sequence, tokens, output_TD, _ in made:
            sequence.tokens, sequence.computed = tokens[: end + 1].tolist(), end
            chunks.append(Chunk(sequence, begin, end - begin, form, sample=True))
            rows.append(output_TD[begin:end])
        drafter.computed(chunks, torch.cat(rows))
        assert [drafter.most(sequence, wanted) for sequence, *_, wanted in made] == [4, 2]
        drafts = drafter.draft([(sequence, wanted) for sequence, *_, wanted in made])
        assert drafts == [
            stated.chain(output_TD[:end], tokens[1 : end + 1], wanted) for _, tokens, output_TD, wanted in made
        ]
        assert drafter.passes == ((2, 2, 1, 1) if form is Form.DECODE else ()), "to catch up takes longer"
