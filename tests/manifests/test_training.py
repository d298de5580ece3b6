"""The training of the bundled model: an interrupted run comes to the numbers of an uninterrupted one, and what a
document adds to the loss is what a reader of it has to find out."""

from __future__ import annotations

import json
import random
import signal
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_recipe import TINY, tiny_recipe

pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
}


@pytest.fixture(scope="module")
def recipe():
    """The recipe for a network of some thousand parameters."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with tiny_recipe() as module:
        module("model").CONFIG.update(SMALL)
        yield module
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def stop_after(monkeypatch: pytest.MonkeyPatch, run: ModuleType, steps: int) -> None:
    """A SIGTERM in the middle of the step that makes it so many."""
    advance = run.Run.advance

    def advance_and_stop(self: Any) -> Any:
        if self.step == steps - 1:
            signal.raise_signal(signal.SIGTERM)
        return advance(self)

    monkeypatch.setattr(run.Run, "advance", advance_and_stop)


@pytest.mark.parametrize("more", [[], ["--loaders", "5", "--batch", "2048"]], ids=["alone", "with loaders"])
def test_an_interrupted_run_goes_on_to_the_same_numbers(recipe, tmp_path, monkeypatch, capsys, more):
    train, run = recipe("train"), recipe("run")
    monkeypatch.setattr(recipe("loaders"), "AHEAD", 4)
    asked = ["--state", str(tmp_path / "whole.pt"), "--steps", "5", "--seed", "3", *more]
    train.main(asked)
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    asked[1] = str(tmp_path / "parts.pt")
    with monkeypatch.context() as patch:
        stop_after(patch, run, 2)
        train.main(asked)
    part = torch.load(tmp_path / "parts.pt", weights_only=True)
    assert part["step"] == 2 and whole["step"] == 5 and not same(part["model"], whole["model"])
    train.main(asked)
    assert same(torch.load(tmp_path / "parts.pt", weights_only=True), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]


def test_a_decay_leaves_the_state_and_goes_on_after_an_interruption(recipe, tmp_path, monkeypatch, capsys):
    train, run = recipe("train"), recipe("run")
    state, out = tmp_path / "state.pt", tmp_path / "out"
    train.main(["--state", str(state), "--steps", "1"])
    before = state.read_bytes()
    monkeypatch.setattr(train, "finish", lambda run, tokenizer, out: torch.save(run.state(), out))
    asked = ["--state", str(state), "--decay", "4", "--out"]
    with monkeypatch.context() as patch:
        stop_after(patch, run, 3)
        train.main([*asked, str(out)])
    assert not out.exists() and (tmp_path / "state.pt.decay").exists()
    train.main([*asked, str(out)])
    train.main([*asked, str(tmp_path / "again")])
    made, again = (torch.load(path, weights_only=True) for path in (out, tmp_path / "again"))
    assert made["step"] == 5 and made["decay"] == (1, 4) and same(made, again)
    assert state.read_bytes() == before and not (tmp_path / "state.pt.decay").exists()


def test_a_decay_of_another_state_is_not_gone_on_with(recipe, tmp_path, monkeypatch, capsys):
    train, run = recipe("train"), recipe("run")
    state, out = tmp_path / "state.pt", tmp_path / "out"
    monkeypatch.setattr(train, "finish", lambda run, tokenizer, out: torch.save(run.state(), out))
    train.main(["--state", str(state), "--steps", "1"])
    asked = ["--state", str(state), "--out", str(out)]
    with monkeypatch.context() as patch:
        stop_after(patch, run, 2)
        train.main([*asked, "--decay", "3"])
    told = r"state\.pt\.decay is a decay of 3 steps from step 1 on that was interrupted, and "
    with pytest.raises(SystemExit, match=told + "--decay is 4; delete it to begin anew"):
        train.main([*asked, "--decay", "4"])
    train.main(["--state", str(state), "--steps", "2"])
    with pytest.raises(SystemExit, match=told + r".*state\.pt is at step 2; delete it"):
        train.main(asked)
    assert not out.exists()
    (tmp_path / "state.pt.decay").unlink()
    train.main([*asked, "--decay", "1"])
    assert torch.load(out, weights_only=True)["decay"] == (2, 1)


def test_a_state_of_before_there_was_a_start_goes_on(recipe, tmp_path, capsys):
    state = tmp_path / "state.pt"
    recipe("train").main(["--state", str(state), "--steps", "1"])
    old = torch.load(state, weights_only=True)
    del old["before"]
    torch.save(old, state)
    recipe("train").main(["--state", str(state), "--steps", "2"])
    made = torch.load(state, weights_only=True)
    assert made["step"] == 2 and made["before"] == {"steps": 0, "tokens": 0}


def test_what_is_made_of_a_state_is_a_checkpoint_and_its_figures(recipe, tmp_path, monkeypatch, capsys):
    train, evaluation = recipe("train"), recipe("evaluation")
    monkeypatch.setattr(train, "report", partial(evaluation.report, documents=30, batches=1))
    monkeypatch.setattr(train, "even_out", partial(train.even_out, batches=2))
    monkeypatch.setattr(evaluation, "SAMPLES", ["What is 3 + 4?"])
    train.main(["--state", str(tmp_path / "state.pt"), "--steps", "1"])
    train.main(["--state", str(tmp_path / "state.pt"), "--decay", "1", "--out", str(tmp_path / "made")])
    told = json.loads((tmp_path / "made" / "training.json").read_text())
    assert told["steps"] == 2 and told["tokens"] == 2 * recipe("batches").BATCH_TOKENS
    counted = [tuple(map(int, row.split("/"))) for row in told["accuracy"].values()]
    # Some of the documents have no one right answer; there are 30, and a few more that the last draw brings.
    assert 20 < sum(of for _, of in counted) < 40 and all(right <= of for right, of in counted)
    assert set(told["samples"]) == {"What is 3 + 4?"} and 0 <= told["mtp_acceptance"]["all_tokens"] <= 1
    again = recipe("checkpoint").restore(load_file(tmp_path / "made" / "model.safetensors"))
    with torch.no_grad():
        logits, ahead = again(torch.tensor([[0, 300, 301]]), passes=2)
    assert [one.shape for one in (logits, *ahead)] == 3 * [(1, 3, 1280)] and logits.isfinite().all()
    assert len(told["mtp_acceptance"]["by_guess"]) == evaluation.GUESSES
    begun = ["--state", str(tmp_path / "second.pt"), "--start", str(tmp_path / "made")]
    train.main([*begun, "--steps", "0"])
    second = torch.load(tmp_path / "second.pt", weights_only=True)
    assert second["before"] == {"steps": 2, "tokens": told["tokens"]} and same(second["model"], again.state_dict())
    assert second["wrong"] == train.wrong_shares(told["by_kind"])
    assert train.wrong_shares({"talk": "3/4", "json": "0/5"}) == {"talk": 0.25, "json": 1.0}


def test_an_answer_is_right_by_its_text_whatever_its_tokens(recipe):
    """Other tokens of the same text are right, another text is not, and bytes that make no character end."""
    evaluation, tokenizer = recipe("evaluation"), recipe("tokenizers").Tokenizer.from_file(str(TINY / "tokenizer.json"))
    whole, cut = tokenizer.encode("place.", add_special_tokens=False).ids, []
    for letter in "place.":
        cut += tokenizer.encode(letter, add_special_tokens=False).ids
    assert whole != cut and tokenizer.decode(cut) == tokenizer.decode(whole)

    def speaks(tokens: list[int]) -> Any:
        def model(given: torch.Tensor) -> tuple[torch.Tensor]:
            at = given.shape[1] - 2  # after a prompt of two
            return (torch.nn.functional.one_hot(torch.tensor([[tokens[at % len(tokens)]]]), 1280).float(),)

        return model

    (half,) = [i for i in range(1280) if tokenizer.id_to_token(i) == "Ã"]  # the first of two bytes
    for said, right in ((whole, True), (cut, True), (cut[::-1], False), ([half], False)):
        assert evaluation.says(speaks(said), tokenizer, [1, 2], whole) == right


def test_an_answer_that_a_schema_holds_is_decoded_by_its_grammar(recipe):
    """Where the model would go on with another key, or with no JSON at all, it says what it finds likeliest of what is
    allowed; a number that it does not end is wrong."""
    evaluation, dialogue = recipe("evaluation"), recipe("dialogue")
    tokenizer = recipe("tokenizers").Tokenizer.from_file(str(TINY / "tokenizer.json"))
    grammars = recipe("held").Grammars(tokenizer)

    def prefers(texts: list[str]) -> Any:
        """A model that would always say the first of these that it may."""
        likes = torch.zeros(1280)
        for rank, text in enumerate(texts):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            likes[ids] = torch.maximum(likes[ids], torch.tensor(100.0 - rank))
        return lambda given: (likes.expand(1, given.shape[1], -1),)

    def right(model: Any, content: str) -> bool:
        doc = dialogue.Doc("schema", [dialogue.user("Ada is 36."), dialogue.assistant(content)], held=True)
        return bool(evaluation.says_held(model, tokenizer, grammars, doc))

    assert right(prefers([",", "hello", "}", "7"]), '{"age": 7}')
    assert not right(prefers([",", "hello", "}", "7"]), '{"age": 8}')
    assert not right(prefers([",", "7", "}"]), '{"age": 7}'), "it never ends"


def test_the_last_part_of_a_decay_rounds_and_guesses_on(recipe, tmp_path, monkeypatch, capsys):
    """The steps before have the first guess alone, and weights as they are."""
    train, model, seen = recipe("train"), recipe("model"), []
    forward = model.Model.forward

    def noted(self: Any, tokens: torch.Tensor, passes: int, *more: Any) -> Any:
        seen.append((passes, model.Rounding.on))
        return forward(self, tokens, passes, *more)

    monkeypatch.setattr(model.Model, "forward", noted)
    monkeypatch.setattr(train, "finish", lambda run, tokenizer, out: None)
    train.main(["--state", str(tmp_path / "state.pt"), "--steps", "2"])
    train.main(["--state", str(tmp_path / "state.pt"), "--decay", "5", "--out", str(tmp_path / "out")])
    assert seen == [(1, False)] * 5 + [(3, True)] * 2


@torch.no_grad()
def test_a_later_pass_sees_what_it_will_when_it_guesses(recipe):
    """Its own hidden state of the position before in the place of the main model's, and before that the main model's:
    as when the layer is applied again, position by position."""
    torch.manual_seed(0)
    model_of = recipe("model")
    model = model_of.Model()
    tokens = torch.randint(3, 1280, (2, 16))
    tokens[:, 0] = tokens[1, 8] = 0  # the second row has two documents
    inputs: list[Any] = []
    predict = model.layers[-1].predict
    model.layers[-1].predict = lambda *asked: inputs.append(asked) or predict(*asked)
    _, ahead = model(tokens, passes=4)
    ((hidden, *others, _),) = inputs
    for begin in (2, 9):
        guessing = hidden.clone()
        for at, logits in enumerate(ahead, begin):
            (made,) = predict(guessing, *others, 1)
            torch.testing.assert_close(model.lm_head(made)[:, at], logits[:, at], atol=1e-4, rtol=0)
            guessing[:, at + 1] = made[:, at]


def test_a_guess_that_would_begin_in_another_document_weighs_nothing(recipe):
    batches = recipe("batches")
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1]])
    batch = batches.Packed(torch.zeros(1, 11, dtype=torch.long), torch.arange(1.0, 12.0)[None], documents, ["a", "b"])
    assert torch.equal(batches.guessed_weights(batch, 1), batch.weights)
    assert batches.guessed_weights(batch, 2).tolist() == [[0, 0, 0, 4, 5, 0, 0, 0, 9, 10, 0]]
    assert batches.guessed_weights(batch, 3).tolist() == [[0, 0, 0, 0, 5, 0, 0, 0, 0, 10, 0]]


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16", "bf16", None])
def test_products_are_in_bfloat16_where_the_machine_has_them(recipe, tmp_path, has):
    quick_dtype, cpuinfo = recipe("run").quick_dtype, tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu avx2 {has or 'avx512f'} fma\n")
    assert quick_dtype(torch.device("cpu"), cpuinfo) == (torch.bfloat16 if has else torch.float32)
    assert quick_dtype(torch.device("cuda"), cpuinfo) == torch.bfloat16
    assert quick_dtype(torch.device("cpu"), tmp_path / "none") == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_step_computes_in_the_dtype_that_is_asked_for(recipe, tmp_path, monkeypatch, capsys, dtype):
    seen = []
    optimisation = recipe("optimisation")
    orthogonal, rotate = optimisation.orthogonal, recipe("model").rotate
    monkeypatch.setattr(optimisation, "orthogonal", lambda x: seen.append(("update", x.dtype)) or orthogonal(x))
    monkeypatch.setattr(recipe("model"), "rotate", lambda x, at: seen.append(("step", x.dtype)) or rotate(x, at))
    recipe("train").main(["--state", str(tmp_path / "state.pt"), "--steps", "1", "--dtype", dtype])
    assert set(seen) == {("update", getattr(torch, dtype)), ("step", getattr(torch, dtype))}


def test_rates_rise_stay_and_fall(recipe):
    rates = recipe("optimisation").Rates(warm_up=10)
    assert [rates.share(step, None) for step in (0, 4, 9, 5000)] == [0.1, 0.5, 1.0, 1.0]
    assert [rates.share(step, (100, 20)) for step in (100, 110, 119)] == pytest.approx([1.0, 0.5, 0.05])
    half = recipe("optimisation").Rates(warm_up=10, peak=0.5)
    assert [half.share(step, None) for step in (4, 9, 5000)] == [0.25, 0.5, 0.5]


def test_every_kind_of_document_asks_and_answers_within_a_context(recipe):
    data, dialogue = recipe("data"), recipe("dialogue")
    r = random.Random(1)
    for kind, (make, weight) in data.KINDS.items():
        docs = [make(r) for _ in range(20)]
        assert weight > 0 and all(doc.render().startswith(dialogue.BOS) for doc in docs), kind
        assert all("{" not in m["content"] for doc in docs for m in doc.messages if kind == "words/spell"), kind
        assert len({doc.render() for doc in docs}) > 1, kind


def tokens_of(recipe, doc):
    """A document's tokens as text, with their weights."""
    batches, tokenizers = recipe("batches"), pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    encoding = tokenizer.encode(doc.render(), add_special_tokens=False)
    special = {s: tokenizer.token_to_id(s) for s in recipe("dialogue").SPECIALS}
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in encoding.ids]
    return list(zip(texts, batches.weights_of(doc, encoding, special), strict=True))


def test_answers_count_in_full_and_prompts_little(recipe):
    dialogue = recipe("dialogue")
    doc = dialogue.Doc("talk", [dialogue.user("What is 3 + 4?"), dialogue.assistant("3 + 4 = 7.")])
    told = tokens_of(recipe, doc)
    assert "".join(text for text, weight in told if weight == 1) == "3 + 4 = 7." + dialogue.EOS
    assert {weight for text, weight in told} == {1.0, recipe("batches").PROMPT_WEIGHT}


def test_what_a_grammar_or_the_prompt_writes_is_not_learned(recipe):
    dialogue = recipe("dialogue")
    answer = dialogue.assistant('{"name": "Ada", "age": 36}')
    held = tokens_of(recipe, dialogue.Doc("schema", [dialogue.user("Ada is 36."), answer], held=True))
    learned = "".join(text for text, weight in held if weight == 1)
    assert learned == ' "Ada36' + dialogue.EOS
    # That a value ends is the model's to say: a grammar allows more digits. What comes then is not.
    ends = [text for text, weight in held if weight == recipe("batches").END_WEIGHT]
    assert ends == ['",', "}"] and recipe("batches").PROMPT_WEIGHT < recipe("batches").END_WEIGHT < 1
    thought = dialogue.assistant("<think>Easy.</think>7")
    opened = dict(tokens_of(recipe, dialogue.Doc("thinking", [dialogue.user("3 + 4?"), thought], thinks=True)))
    assert opened["<think>"] == 0 and opened["</think>"] == 1


def test_kinds_without_one_right_answer_are_drawn_by_the_mean_share_of_the_rest(recipe):
    data, mix = recipe("data"), recipe("mix").Mix()
    r = random.Random(3)
    made = {kind: [make(r) for _ in range(4)] for kind, (make, _) in data.KINDS.items()}
    assert {kind for kind, docs in made.items() if not any(doc.exact for doc in docs)} == data.OPEN
    for kind in data.KINDS:
        mix.wrong[kind] = 0.0
    assert data.weights(mix) == pytest.approx([weight * recipe("mix").LEAST for _, weight in data.KINDS.values()])
    mix.wrong["tools"] = 1.0
    more = dict(zip(data.KINDS, data.weights(mix), strict=True))
    assert more["tools"] == 1 / recipe("mix").ENOUGH * data.KINDS["tools"][1]
    exact = sum(weight for kind, (_, weight) in data.KINDS.items() if kind not in data.OPEN)
    added = (1 / recipe("mix").ENOUGH - recipe("mix").LEAST) * data.KINDS["tools"][1] / exact
    assert more["story"] / data.KINDS["story"][1] == pytest.approx(recipe("mix").LEAST + added)


@pytest.mark.parametrize("loaders", [[], ["--loaders", "2"]], ids=["alone", "with loaders"])
def test_a_kind_that_is_asked_for_is_drawn_oftener(recipe, loaders, tmp_path, monkeypatch, capsys):
    """Also by loaders, which are other processes."""
    drawn: set[str] = set()

    def right_documents(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        drawn.update(batch.kinds)
        return torch.zeros(len(batch.kinds), dtype=torch.bool)

    monkeypatch.setattr(recipe("run"), "right_documents", right_documents)
    monkeypatch.setattr(recipe("loaders"), "AHEAD", 1)
    asked = ["--state", str(tmp_path / "a.pt"), "--steps", "1", "--batch", "2048", *loaders]
    recipe("train").main([*asked, "--more", "units=1", "--more", "schema/held_sum=1e6"])
    assert drawn == {"schema/held_sum"}


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("sums=4", "'sums' is no kind of document; there are "),
        ("units=often", "'units=often' is not KIND=TIMES, as in units=4"),
        ("units", "'units' is not KIND=TIMES"),
        ("units=nan", "'units=nan' is not KIND=TIMES"),
        ("units=0", "'units=0' is not KIND=TIMES"),
    ],
)
def test_what_is_no_kind_or_no_number_of_times_is_named(recipe, said: str, why: str, tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe("train").main(["--state", str(tmp_path / "a.pt"), "--more", said])
    assert why in capsys.readouterr().err


def test_kinds_that_are_right_are_drawn_less_often(recipe):
    mix = recipe("mix").Mix()
    for _ in range(400):
        mix.record("easy", True)
        mix.record("hard", False)
    assert mix.share("easy") == recipe("mix").LEAST < mix.share("hard") == mix.share("new") == 1 / recipe("mix").ENOUGH
    mix.wrong["half"] = recipe("mix").ENOUGH
    assert mix.share("half") == 1.0
