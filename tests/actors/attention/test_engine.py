"""The engine's sampling and log-probabilities, and the tensors that a step is made of. That its tokens are right is
test_parity.py's subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepseek_checkpoints import make_checkpoint
from drafters import Guesser, always

from isotherm.actors.attention.engine import Engine
from isotherm.actors.attention.lost_experts import ExpertsLostError
from isotherm.actors.local import local_engine, run
from isotherm.actors.models.local_experts import LocalExperts
from isotherm.actors.models.step_batch import build_batch
from isotherm.cluster.engine.config import SchedulerConfig
from isotherm.cluster.engine.sequence import Chunk, Form, ScheduledSequence
from isotherm.cluster.messages.requests import FinishReason, GenerationRequest, SamplingParams
from isotherm.cluster.model.checkpoint import Checkpoint
from isotherm.cluster.model.weight_choice import WeightChoice
from isotherm.kernels.reference import ReferenceKernels


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(make_checkpoint(tmp_path_factory.mktemp("checkpoint"), seed=3))


@pytest.fixture
def engine(checkpoint: Checkpoint) -> Engine:
    config = SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128)
    return local_engine(checkpoint, ReferenceKernels(torch.float32), config)


PROMPT = (5, 250, 17, 99, 4, 123)


def request(
    name: str, max_tokens: int = 12, prompt: tuple[int, ...] = PROMPT, generated: tuple[int, ...] = (), **params: Any
) -> GenerationRequest:
    return GenerationRequest(name, prompt, SamplingParams(max_tokens, **params), generated)


def generate(engine: Engine, *requests: GenerationRequest) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {}
    for delta in run(engine, requests):
        out.setdefault(delta.request_id, []).extend(delta.token_ids)
    return out


def test_an_idle_engine_does_nothing(engine: Engine):
    assert engine.step() == [] and engine.steps == 0


def test_sampled_tokens_depend_on_the_seed_and_not_on_the_batch(engine: Engine):
    requests = [request(f"seed-{s}", temperature=3.0, seed=s) for s in range(6)]
    alone = {name: tokens for r in requests for name, tokens in generate(engine, r).items()}
    assert len({tuple(t) for t in alone.values()}) == 6
    assert generate(engine, *requests) == alone
    assert generate(engine, *reversed(requests)) == alone


def test_a_resumed_sampled_request_goes_on_with_the_same_noise(engine: Engine):
    asked = request("a", temperature=3.0, seed=11)
    tokens = generate(engine, asked)["a"]
    for done in (1, 5, 11):
        assert generate(engine, asked.resumed(tuple(tokens[:done])))["a"] == tokens[done:]


def test_noise_is_drawn_by_seed_and_index_among_the_output_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """Whatever was found in the prefix cache, cut into chunks, preempted or resumed."""
    drawn: list[tuple[int, int]] = []
    original = ReferenceKernels.sample

    def record(self: ReferenceKernels, *args: torch.Tensor) -> torch.Tensor:
        drawn.extend(zip(args[4].tolist(), args[5].tolist(), strict=True))
        return original(self, *args)

    monkeypatch.setattr(ReferenceKernels, "sample", record)
    long = tuple(range(40))  # longer than the budget of a step
    for asked in (
        request("a", 6, long, seed=8),
        request("b", 6, long, seed=8),
        request("c", 6, long, generated=(1, 2, 3), seed=8),
    ):
        drawn.clear()
        engine.scheduler.add(asked)
        while len(engine.scheduler):
            engine.step()
            if len(drawn) == 2 and not engine.scheduler.preemptions:
                engine.scheduler.preempt(asked.id)
        assert drawn == [(8, i) for i in range(len(asked.generated), 6)]
    assert engine.scheduler.preemptions == 1


def test_every_row_gets_its_own_parameters(engine: Engine):
    """In one step: greedy beside top-k 1 beside a hot one."""
    greedy = generate(engine, request("g", temperature=0.0))["g"]
    hot = {"temperature": 5.0, "seed": 1}
    out = generate(
        engine,
        request("hot", **hot),
        request("greedy", temperature=0.0),
        request("top-k", **hot, top_k=1),
        request("top-p", **hot, top_p=0.0),
        request("other-seed", temperature=5.0, seed=2),
    )
    assert out["greedy"] == out["top-k"] == out["top-p"] == greedy
    assert out["hot"] != greedy and out["hot"] != out["other-seed"]


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-6])
def test_a_temperature_too_small_to_divide_by_is_greedy(engine: Engine, temperature: float):
    greedy = generate(engine, request("g", temperature=0.0))["g"]
    assert generate(engine, request("a", temperature=temperature, seed=5))["a"] == greedy


def test_a_stop_token_ends_one_request_and_no_other(engine: Engine):
    tokens = generate(engine, request("g", temperature=0.0))["g"]
    stop = tokens[3]
    deltas = list(
        run(engine, [request("stops", temperature=0.0, stop_token_ids=(stop,)), request("goes-on", temperature=0.0)])
    )
    stopped = [d for d in deltas if d.request_id == "stops"]
    assert [t for d in stopped for t in d.token_ids] == tokens[: tokens.index(stop) + 1]
    assert stopped[-1].finish_reason is FinishReason.STOP
    assert [t for d in deltas if d.request_id == "goes-on" for t in d.token_ids] == tokens
    assert engine.scheduler.blocks.used == 0


@pytest.mark.parametrize("top", [None, 0, 3])
def test_log_probabilities_are_given_as_many_as_asked(engine: Engine, top: int | None):
    deltas = list(
        run(engine, [request("a", 3, temperature=2.0, seed=4, logprobs=top), request("b", 3, temperature=0.0)])
    )
    for delta in deltas:
        if delta.request_id == "b" or top is None:
            assert delta.logprobs == ()
        else:
            (logprobs,) = delta.logprobs
            assert len(logprobs.top) == top and logprobs.chosen < 0


# --- several tokens per step ----------------------------------------------------------------------


class Guess(Guesser):
    """Drafts what is given for a request, by how far it is; wrong in every n-th place."""

    def __init__(self, tokens: dict[str, list[int]], wrong: int):
        self.tokens, self.wrong = tokens, wrong

    def guess(self, sequence: ScheduledSequence, most: int) -> list[int]:
        known = self.tokens[sequence.request.id]
        right = known[sequence.generated : sequence.generated + 3]
        return [t + 1 if self.wrong and (sequence.generated + i) % self.wrong == 0 else t for i, t in enumerate(right)]


@pytest.mark.parametrize("wrong", [0, 1, 3])
def test_drafts_change_no_token(checkpoint: Checkpoint, wrong: int):
    """Right ones, wrong ones, and both: tokens, their log-probabilities, stops and lengths are what they were."""
    config = SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128)
    asked = [
        request("greedy", 20, temperature=0.0, logprobs=2),
        request("hot", 17, temperature=2.0, seed=3, frequency_penalty=0.5),
        request("resumed", 12, temperature=2.0, seed=4, generated=(3, 4, 5)),
        request("one", 1, temperature=0.0),
    ]

    def deltas(drafter: Guess | None) -> tuple[dict[str, list[Any]], dict[str, list[int]], int]:
        engine = local_engine(checkpoint, ReferenceKernels(torch.float32), config)
        engine.speculation = None if drafter is None else always(drafter)
        out: dict[str, list[Any]] = {r.id: [] for r in asked}
        tokens: dict[str, list[int]] = {r.id: list(r.generated) for r in asked}
        for delta in run(engine, asked):
            assert delta.start == len(tokens[delta.request_id])
            tokens[delta.request_id] += delta.token_ids
            ends = [None] * (len(delta.token_ids) - 1) + [delta.finish_reason]
            chosen = [round(p.chosen, 4) for p in delta.logprobs] or [None] * len(ends)
            out[delta.request_id] += zip(delta.token_ids, chosen, ends, strict=True)
        assert engine.scheduler.blocks.used == 0
        return out, tokens, engine.steps

    plain, tokens, steps = deltas(None)
    drafted, _, fewer = deltas(Guess(tokens, wrong))
    assert drafted == plain
    assert fewer == steps if wrong == 1 else fewer < steps


# --- the tensors of a step ------------------------------------------------------------------------


def sequence(name: str, prompt: int, generated: int, blocks: list[int]) -> ScheduledSequence:
    """Tokens are numbered from 100 × the letter's place on."""
    tokens = [100 * (ord(name) - ord("a")) + i for i in range(prompt + generated)]
    return ScheduledSequence(
        GenerationRequest(name, tuple(tokens[:prompt]), SamplingParams(9)), 0, tokens, blocks=blocks
    )


# Tables that say which position was read.
COS, SIN = torch.arange(16.0)[:, None], 100 + torch.arange(16.0)[:, None]


def test_a_step_written_out():
    a, b, c = sequence("a", 5, 4, [7, 3, 9]), sequence("b", 1, 1, [2]), sequence("c", 7, 0, [5, 1])
    batch = build_batch(
        [Chunk(a, 6, 3, Form.DECODE, True), Chunk(b, 1, 1, Form.DECODE, True), Chunk(c, 2, 3, Form.PREFILL, False)],
        4,
        COS,
        SIN,
    )
    rows = batch.attention
    assert batch.token_ids.tolist() == [6, 7, 8, 101, 202, 203, 204]
    assert rows.cos_TR2[:, 0].tolist() == [6, 7, 8, 1, 2, 3, 4]
    assert rows.sin_TR2[:, 0].tolist() == [106, 107, 108, 101, 102, 103, 104]
    assert rows.cache_slots.tolist() == [3 * 4 + 2, 3 * 4 + 3, 9 * 4, 2 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 1 * 4]
    assert rows.decodes == 4
    assert rows.decode_tables.tolist() == [[7, 3, 9], [2, 0, 0]]
    assert rows.decode_sequence.tolist() == [0, 0, 0, 1]
    assert rows.decode_lengths.tolist() == [7, 8, 9, 2]
    (prefill,) = rows.prefills
    assert (prefill.first, prefill.count, prefill.start, prefill.block_table.tolist()) == (4, 3, 2, [5, 1])
    assert batch.sample_rows.tolist() == [2, 3]
    tensors = {name: t for part in (batch, rows) for name, t in vars(part).items() if isinstance(t, torch.Tensor)}
    assert {name: t.dtype for name, t in tensors.items()} == {
        "token_ids": torch.int64, "cos_TR2": torch.float32, "sin_TR2": torch.float32, "cache_slots": torch.int64,
        "decode_tables": torch.int32, "decode_sequence": torch.int32, "decode_lengths": torch.int32,
        "sample_rows": torch.int64,
    }  # fmt: skip


def test_a_step_of_prompts_only_has_no_decode_tables():
    batch = build_batch([Chunk(sequence("a", 3, 0, [0]), 0, 3, Form.PREFILL, True)], 4, COS, SIN)
    assert (batch.attention.decodes, batch.attention.decode_tables.numel(), batch.sample_rows.tolist()) == (0, 0, [2])


def test_rows_of_one_sequence_stand_as_they_do_among_others():
    """Positions of a single sequence are had in another way."""
    a, b = sequence("a", 5, 4, [7, 3, 9]), sequence("b", 1, 1, [2])
    one, other = Chunk(a, 6, 3, Form.DECODE, True), Chunk(b, 1, 1, Form.DECODE, True)
    alone, together = (build_batch(chunks, 4, COS, SIN).attention for chunks in ([one], [one, other]))
    assert torch.equal(alone.cos_TR2, together.cos_TR2[:3]) and torch.equal(alone.sin_TR2, together.sin_TR2[:3])


def test_sampled_rows_are_not_copied_where_they_are_all():
    decodes = [Chunk(sequence(name, 5, 4, [at, at + 2]), 6, 1, Form.DECODE, True) for at, name in enumerate("ab")]
    x = torch.arange(8.0).view(2, 4)
    assert build_batch(decodes, 4, COS, SIN).sampled(x) is x
    prompt = Chunk(sequence("c", 3, 0, [5]), 0, 3, Form.PREFILL, True)
    x = torch.arange(12.0).view(3, 4)
    assert build_batch([prompt], 4, COS, SIN).sampled(x).tolist() == [x[2].tolist()]


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 3])
def test_a_loaded_model_does_not_need_its_files(tmp_path: Path, heads: int):
    """Overwritten after loading: a weight that is still a view of the mapped file would change."""
    make_checkpoint(
        tmp_path,
        {"num_attention_heads": heads, "num_key_value_heads": heads, "attention_bias": True},
        dtype="float32",
        shards=2,
    )
    config = SchedulerConfig(
        block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128, prefix_cache=False
    )
    engine = local_engine(Checkpoint.open(tmp_path), ReferenceKernels(torch.float32), config)
    expected = generate(engine, request("before", 20, temperature=0.0))["before"]
    for file in tmp_path.glob("*.safetensors"):
        size = file.stat().st_size
        with open(file, "r+b") as stream:
            stream.write(b"\x3f" * size)
    assert generate(engine, request("after", 20, temperature=0.0))["after"] == expected


def test_biases_that_the_config_does_not_ask_for_are_not_used(tmp_path: Path):
    """As transformers: `attention_bias` false leaves them out, and q_b_proj never has one."""
    overrides = {"attention_bias": False}
    names = [f"model.layers.1.self_attn.{n}.bias" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")]
    make_checkpoint(tmp_path / "plain", overrides)
    make_checkpoint(tmp_path / "stray", overrides, change=lambda t: t.update({n: torch.full((7,), 3.0) for n in names}))
    config = SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128)
    plain, stray = (
        local_engine(Checkpoint.open(tmp_path / n), ReferenceKernels(torch.float32), config) for n in ("plain", "stray")
    )
    asked = request("a", temperature=0.0)
    assert generate(plain, asked) == generate(stray, asked)


def test_an_expert_group_reads_no_attention_weight_and_a_shard_no_expert(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
    from isotherm.actors.models.weights import WeightReader

    names: list[str] = []
    original = WeightReader.tensor
    monkeypatch.setattr(WeightReader, "tensor", lambda self, name: names.append(name) or original(self, name))
    with WeightReader(checkpoint) as reader:
        DeepseekV3Model(checkpoint.config, ReferenceKernels(torch.float32), reader, 128)
        assert reader.bytes_read == sum(checkpoint.tensors[n].nbytes for n in names)
    assert sorted(names) == sorted(n for n in checkpoint.tensors if ".experts." not in n)


def test_loading_tells_its_progress(checkpoint: Checkpoint):
    from isotherm.actors.models.deepseek_v3 import DeepseekV3Model
    from isotherm.actors.models.weights import WeightReader

    seen: list[float] = []
    with WeightReader(checkpoint) as reader:
        DeepseekV3Model(checkpoint.config, ReferenceKernels(torch.float32), reader, 128, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]


def test_dtypes_of_a_manifest():
    from isotherm.actors.models.weights import parse_dtype

    assert (parse_dtype("bfloat16"), parse_dtype("float32")) == (torch.bfloat16, torch.float32)
    with pytest.raises(ValueError, match='dtype is "float16"; it must be "bfloat16" or "float32"'):
        parse_dtype("float16")


@pytest.mark.parametrize(("form", "least", "most"), [
    ("fp8", 0.001, 0.06),  # e4m3 rounds each weight by up to a sixteenth, about a fortieth on average
    ("int4", 0.05, 0.2),  # some eight hundredths of normal weights
])  # fmt: skip
def test_a_quantised_head_gives_nearly_the_same_logits(tmp_path: Path, form: str, least: float, most: float):
    make_checkpoint(tmp_path, {}, dtype="float32")
    checkpoint, config = (
        Checkpoint.open(tmp_path),
        SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128),
    )
    logits = []
    for head in ("stored", form):
        engine = local_engine(checkpoint, ReferenceKernels(torch.float32), config, choice=WeightChoice(head=head))
        batch = build_batch(
            [Chunk(sequence("a", 9, 0, [0, 1, 2]), 0, 9, Form.PREFILL, True)], 4, engine.model.cos, engine.model.sin
        )
        logits.append(engine.model.logits(engine.model.forward(batch, engine.cache, engine.experts)))
    difference = (logits[1] - logits[0]).std() / logits[0].std()
    assert least < difference < most


# --- a request that makes the step fail -----------------------------------------------------------


def fail_with(engine: Engine, poison: str) -> list[int]:
    """Each batch that holds the request `poison` fails from now on. Gives the sizes of those that did."""
    failed: list[int] = []
    compute = engine._compute

    def failing(chunks: Any) -> Any:
        if any(c.sequence.request.id == poison for c in chunks):
            failed.append(len(chunks))
            raise RuntimeError("out of memory\nand more")
        return compute(chunks)

    engine._compute = failing  # type: ignore[method-assign]
    return failed


@pytest.mark.parametrize("place", [0, 5, 11])
def test_the_request_that_makes_a_step_fail_ends_alone(engine: Engine, place: int):
    requests = [request(f"r{i}", prompt=(5 + i, 250, 17), temperature=1.0, seed=i) for i in range(11)]
    alone = {name: tokens for r in requests for name, tokens in generate(engine, r).items()}
    failed = fail_with(engine, "poison")
    requests.insert(place, request("poison"))
    ends = {}
    out: dict[str, list[int]] = {}
    for delta in run(engine, requests):
        out.setdefault(delta.request_id, []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            ends[delta.request_id] = delta.finish_reason, delta.error
    assert ends.pop("poison") == (FinishReason.ERROR, "RuntimeError: out of memory")
    assert {name: tokens for name, tokens in out.items() if name != "poison"} == alone
    assert set(ends.values()) == {(FinishReason.LENGTH, "")}
    assert failed[0] >= 8 and failed[-1] == 1 and len(failed) <= 5, "by halves"
    assert engine.scheduler.blocks.used == 0 and not engine.experts.finding_fault


def test_a_failure_that_does_not_come_again_ends_nobody(engine: Engine):
    compute, failed = engine._compute, []

    def once(chunks: Any) -> Any:
        if not failed:
            failed.append(True)
            raise RuntimeError("a passing one")
        return compute(chunks)

    expected = generate(engine, request("a"), request("b", prompt=(9, 8, 7)))
    engine._compute = once  # type: ignore[method-assign]
    assert generate(engine, request("a"), request("b", prompt=(9, 8, 7))) == expected


def test_what_half_a_step_gave_is_not_lost_with_the_experts_of_the_other(engine: Engine):
    """A request that had ended in it got no last delta: its client waited for ever."""
    compute = engine._compute

    def lost_behind(chunks: Any) -> Any:
        if len(chunks) > 1:
            raise RuntimeError("out of memory")
        if chunks[0].sequence.request.id == "b":
            raise ExpertsLostError("layer 1: nobody holds expert 3")
        return compute(chunks)

    engine._compute = lost_behind  # type: ignore[method-assign]
    engine.scheduler.add(request("a", max_tokens=1))
    engine.scheduler.add(request("b"))
    with pytest.raises(ExpertsLostError):
        engine.step()
    (delta,) = engine.take_unsent()
    assert (delta.request_id, delta.finish_reason) == ("a", FinishReason.LENGTH) and engine.take_unsent() == []
    assert engine.scheduler.request_ids() == ["b"]


def test_lost_experts_are_nobodys_fault(engine: Engine):
    class Lost(LocalExperts):
        abandoned = 0

        def bank_of(self, layer: int) -> None:  # type: ignore[override]
            """They are elsewhere."""

        def moe(self, *args: Any) -> torch.Tensor:
            raise ExpertsLostError("layer 1: nobody holds expert 3")

        def abandon(self) -> None:
            self.abandoned += 1

    assert isinstance(engine.experts, LocalExperts)
    engine.experts = experts = Lost(engine.model.kernels, engine.experts.bank_of(1)[0], np.zeros((1, 1), np.int32))
    engine.scheduler.add(request("a"))
    engine.scheduler.add(request("b"))
    with pytest.raises(ExpertsLostError):
        engine.step()
    assert experts.abandoned == 1 and len(engine.scheduler) == 2


def test_each_step_is_counted_and_an_idle_one_is_not(engine: Engine):
    engine.step()
    generate(engine, request("a", 3, PROMPT), request("b", 3, PROMPT))
    found = {family.metric.name: family.values[()] for family in engine.figures.read(engine.scheduler)}
    assert found["isotherm_step_seconds"].count == found["isotherm_step_requests"].count == engine.steps
    assert found["isotherm_step_tokens"].total == 2 * (len(PROMPT) + 2)
    assert found["isotherm_step_exchange_wait_seconds"].total == 0, "all experts are in this process"
    assert found["isotherm_prefix_cache_lookup_tokens_total"] == 2 * len(PROMPT)


def test_waits_for_groups_are_counted_with_the_step_and_the_request(checkpoint: Checkpoint):
    config = SchedulerConfig(block_size=4, blocks=64, max_batch_tokens=32, max_sequences=16, max_model_len=128)
    engine = local_engine(checkpoint, ReferenceKernels(torch.float32), config, groups=2)
    deltas = list(run(engine, [request("a", 3)]))
    found = {family.metric.name: family.values[()] for family in engine.figures.read(engine.scheduler)}
    waited = found["isotherm_step_exchange_wait_seconds"].total
    assert 0 < waited < found["isotherm_step_seconds"].total
    assert deltas[-1].course is not None and 0 < deltas[-1].course.group_wait <= waited
