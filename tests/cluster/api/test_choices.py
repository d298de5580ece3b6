"""Deltas of tokens to deltas of choices, and the replies that are made of them: the same however the tokens are cut."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from isotherm.cluster.api.choices import ChoiceDelta, ChoiceStream, GenerationError, LogprobForm, merged
from isotherm.cluster.api.logprobs import token_text
from isotherm.cluster.api.openai_replies import OpenAIReply
from isotherm.cluster.api.replies import Usage, usage
from isotherm.cluster.messages.requests import Delta, FinishReason, GenerationRequest, SamplingParams, TokenLogprobs
from isotherm.cluster.text.output import LastCall, OutputFields, ToolCallPiece
from isotherm.cluster.text.output_parsers import make_parser
from isotherm.cluster.text.tokenizer import Tokenizer

TINY = Tokenizer.load(Path(__file__).resolve().parents[3] / "manifests" / "tiny")
EOS = min(TINY.eos_token_ids)


def with_special_tags():
    """The bundled tokenizer with tags of thoughts that are flagged special, as some checkpoints have them."""
    backend = Backend.from_file(str(Path(__file__).resolve().parents[3] / "manifests" / "tiny" / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in ("<think>", "</think>")])
    return Tokenizer(backend, special_tokens={}, eos_token_ids=TINY.eos_token_ids)


HIDING = with_special_tags()
REPLY = "<think>3 + 4 is 7.</think>It is 7, <think>really</think>."


def ids(text):
    return TINY.encode(text, add_special_tokens=False)


def choice(
    *,
    tokenizer=TINY,
    parser=None,
    prompt="",
    stop=(),
    skip_special_tokens=True,
    logprobs=None,
    echo="",
    form=LogprobForm.CHAT,
):
    params = SamplingParams(100, stop_token_ids=(EOS,), logprobs=logprobs)
    return ChoiceStream(
        0,
        GenerationRequest("r", (1,), params),
        tokenizer,
        parser or make_parser("think", prompt),
        stop=stop,
        skip_special_tokens=skip_special_tokens,
        logprob_form=form,
        echo=echo,
    )


def deltas(tokens, cuts=(), finish=FinishReason.LENGTH):
    """The tokens as the engine sends them, cut before the tokens at `cuts`."""
    ends = [0, *sorted({cut % len(tokens) for cut in cuts} - {0}), len(tokens)]
    for begin, end in pairwise(ends):
        part = tuple(tokens[begin:end])
        probs = tuple(TokenLogprobs(-float(begin + i)) for i in range(len(part)))
        yield Delta("r", begin, part, finish if end == len(tokens) else None, probs)


def fed(stream, parts):
    out = []
    for part in parts:
        out.append(stream.feed(part))
        if stream.finish_reason is not None:
            break
    return out


def read(text, cuts=(), finish=FinishReason.LENGTH, **options):
    stream = choice(**options)
    tokens = ids(text) + ([EOS] if finish is FinishReason.STOP else [])
    return merged(fed(stream, deltas(tokens, cuts, finish))), stream


CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(
    CUTS,
    st.sampled_from(["", "<Assistant><think>"]),
    st.sampled_from([(), ("7",), ("</think>It",), ("really",)]),
    st.booleans(),
    st.sampled_from([TINY, HIDING]),
)
def test_however_the_tokens_are_cut_the_choice_is_the_same(cuts, prompt, stop, skip, tokenizer):
    text = REPLY if not prompt else REPLY.removeprefix("<think>")
    options = {"prompt": prompt, "stop": stop, "skip_special_tokens": skip, "logprobs": 0, "tokenizer": tokenizer}
    one, whole = read(text, (), FinishReason.STOP, **options)
    other, cut = read(text, cuts, FinishReason.STOP, **options)
    assert one == other
    assert usage(1, [whole], 1) == usage(1, [cut], 1)


def test_guesses_that_were_right_and_wrong_are_counted():
    streams = [choice(), choice()]
    for stream in streams:
        stream.feed(Delta("a", 0, tuple(ids("7 is")), drafts_accepted=2, drafts_rejected=1))
        stream.feed(Delta("a", len(ids("7 is")), (), FinishReason.LENGTH, drafts_rejected=3))
    used = usage(1, streams, 2)
    assert (used.accepted_tokens, used.rejected_tokens) == (4, 8)


def test_guesses_behind_a_stop_string_were_not_right():
    """They are no part of the reply: no more of its tokens were guessed than it has."""
    stream, tokens = choice(stop=("is",), parser=make_parser("plain")), ids("7 is what it is, I think")
    stream.feed(Delta("a", 0, tuple(tokens), drafts_accepted=len(tokens) - 1, drafts_rejected=2))
    assert stream.finish_reason == "stop" and 0 < stream.completion_tokens < len(tokens) - 1
    assert stream.drafts_accepted == stream.completion_tokens
    assert stream.drafts_accepted + stream.drafts_rejected == len(tokens) - 1 + 2


@pytest.mark.parametrize("prompt", ["", "<Assistant><think>"])
@pytest.mark.parametrize("tokenizer", [TINY, HIDING], ids=["tags as published", "special tags"])
def test_the_thought_is_a_field_of_its_own(prompt, tokenizer):
    text = REPLY if not prompt else REPLY.removeprefix("<think>")
    delta, stream = read(text, range(200), FinishReason.STOP, prompt=prompt, logprobs=0, tokenizer=tokenizer)
    # Special tokens that mean nothing where they stand are left out, as from any text.
    answer = "It is 7, really." if tokenizer is HIDING else "It is 7, <think>really</think>."
    assert delta.fields == OutputFields(answer, "3 + 4 is 7.") and delta.finish_reason == "stop"
    thought = len(ids(text[: text.index("</think>") + 8]))
    assert stream.reasoning_tokens == thought < stream.completion_tokens == len(ids(text)) + 1
    assert delta.logprobs is not None
    told = delta.logprobs["content"]
    assert [entry["logprob"] for entry in told] == [-float(i) for i in range(len(ids(text)))]
    assert b"".join(bytes(entry["bytes"]) for entry in told).decode() == text


def test_without_the_split_the_text_is_as_it_was():
    delta, stream = read(REPLY, parser=make_parser("plain"))
    assert delta.fields == OutputFields(REPLY) and stream.reasoning_tokens == 0
    hidden, _ = read(REPLY, parser=make_parser("plain"), tokenizer=HIDING)
    assert hidden.fields == OutputFields("3 + 4 is 7.It is 7, really.")
    shown, _ = read(REPLY, parser=make_parser("plain"), tokenizer=HIDING, skip_special_tokens=False)
    assert shown.fields == OutputFields(REPLY)


def test_a_reply_cut_short_in_its_thought_has_no_content():
    delta, stream = read("so 3 + 4 </thi", prompt="<think>")
    assert delta.fields == OutputFields("", "so 3 + 4 </thi") and delta.finish_reason == "length"
    assert stream.reasoning_tokens == stream.completion_tokens


def test_a_stop_string_in_the_thought_ends_the_reply():
    delta, stream = read(REPLY, range(200), stop=("is",))
    assert delta.fields == OutputFields("", "3 + 4 ") and delta.finish_reason == "stop"
    assert stream.completion_tokens == stream.reasoning_tokens < len(ids(REPLY))


def test_gaps_repeats_and_errors():
    stream = choice()
    tokens = ids("one two three")
    first = stream.feed(Delta("r", 0, tuple(tokens[:4])))
    again = stream.feed(Delta("r", 2, tuple(tokens[2:]), FinishReason.LENGTH))
    assert merged([first, again]).fields == OutputFields("one two three")
    assert stream.completion_tokens == len(tokens)
    with pytest.raises(GenerationError, match="tokens 0 to 0 of the output are missing"):
        choice().feed(Delta("r", 1, (5,)))
    with pytest.raises(GenerationError, match="broke"):
        choice().feed(Delta("r", 0, (), FinishReason.ERROR, error="broke"))


def test_an_echo_comes_before_everything():
    assert read("b", parser=make_parser("plain"), echo="a")[0].fields == OutputFields("ab")


class CallParser:
    """What a further format is: a line of text is content, and `[name arguments]` a tool call."""

    tags: tuple[str, ...] = ()
    is_reasoning = False
    is_over = False
    last_call = LastCall.NONE

    def __init__(self) -> None:
        self._text = ""

    def feed(self, text):
        self._text += text
        return OutputFields()

    def finish(self):
        content, call, rest = self._text.partition("[")
        if not call:
            return OutputFields(content)
        self.last_call = LastCall.CLOSED if "]" in rest else LastCall.UNMARKED
        name, _, arguments = rest.rstrip("]").partition(" ")
        return OutputFields(content, "", (ToolCallPiece(0, "call-0", name, arguments),))


def reply(chat=True):
    return OpenAIReply("id", "m", 0, None, chat=chat)


def chunks(form, part):
    """The chunks in a delta's events."""
    return [json.loads(event.removeprefix(b"data: ")) for event in form.events(part).split(b"\n\n")[:-1]]


def test_a_completion_tells_the_log_probability_of_its_end_and_a_chat_does_not():
    """lm-eval drops the last of them, as that of the token it did not ask for: without the end's it dropped another."""
    (alone,) = fed(choice(logprobs=0, form=LogprobForm.COMPLETION), deltas([EOS], finish=FinishReason.STOP))
    assert len(alone.logprobs["token_logprobs"]) == 1 and alone.fields.content == ""
    for cuts in ((), (1,), (2,)):
        parts = fed(
            choice(logprobs=0, form=LogprobForm.COMPLETION), deltas([*ids("It is"), EOS], cuts, FinishReason.STOP)
        )
        said = merged(parts).logprobs
        assert said["tokens"][-1] == token_text(TINY, EOS)
        assert len(said["tokens"]) == len(said["token_logprobs"]) == len(said["text_offset"]) == len(ids("It is")) + 1
        assert said["text_offset"][-1] == len("It is")
    (chat,) = fed(choice(logprobs=0), deltas([*ids("It is"), EOS], finish=FinishReason.STOP))
    assert len(chat.logprobs["content"]) == len(ids("It is"))


def test_choices_begin_in_the_order_of_their_indices():
    """openai-python's stream helper appends a choice that it has not seen, and then looks it up by its index."""
    form = reply()
    said = [
        (chunk["choices"][0]["index"], chunk["choices"][0]["delta"].get("role"))
        for delta in (
            ChoiceDelta(2, OutputFields("c")),
            ChoiceDelta(1, OutputFields("b")),
            ChoiceDelta(0, OutputFields("a")),
        )
        for chunk in chunks(form, delta)
    ]
    assert said == [(0, "assistant"), (1, "assistant"), (2, "assistant"), (2, None), (1, None), (0, None)]


def test_a_parser_of_tool_calls_needs_nothing_else():
    parts = fed(choice(parser=CallParser()), deltas([*ids('Wait.[add {"a": 1}]'), EOS], (3,), FinishReason.STOP))
    (whole,) = reply().whole([merged(parts)], Usage(0, 0, 0, 0))["choices"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"] == {
        "role": "assistant",
        "content": "Wait.",
        "refusal": None,
        "tool_calls": [{"id": "call-0", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
    }
    form = reply()
    bodies = [chunk["choices"][0]["delta"] for part in parts for chunk in chunks(form, part)]
    named = {"index": 0, "id": "call-0", "type": "function", "function": {"name": "add", "arguments": ""}}
    argued = {"index": 0, "function": {"arguments": '{"a": 1}'}}
    assert bodies[1:] == [{"content": "Wait."}, {"tool_calls": [named]}, {"tool_calls": [argued]}, {}]


@pytest.mark.parametrize(
    ("text", "finish", "stop", "reason", "cut"),
    [
        ('[add {"a": 1}]', FinishReason.STOP, (), "tool_calls", False),
        ('[add {"a": 1}', FinishReason.STOP, (), "tool_calls", False),  # the model left its end out
        ('[add {"a": 1} more', FinishReason.STOP, ("more",), "stop", True),
        ('[add {"a": 1}] more', FinishReason.STOP, ("more",), "tool_calls", False),
        ('[add {"a": 1}', FinishReason.LENGTH, (), "length", True),
        ('[add {"a": 1}]', FinishReason.LENGTH, (), "length", False),
        ("no call", FinishReason.STOP, (), "stop", False),
    ],
)
def test_a_choice_ends_for_calls_where_the_last_is_whole(text, finish, stop, reason, cut):
    one, stream = read(text, (), finish, parser=CallParser(), stop=stop)
    assert (one.finish_reason, stream.finish_reason, one.cuts_call) == (reason, reason, cut)


def test_a_stop_token_of_the_clients_own_ends_no_call_for_the_model():
    tokens = ids('[add {"a": 1}')
    params = SamplingParams(100, stop_token_ids=(EOS, tokens[-1]))
    request, options = GenerationRequest("r", (1,), params), {"stop": (), "skip_special_tokens": True}
    stream = ChoiceStream(0, request, TINY, CallParser(), **options, logprob_form=None, echo="")
    (whole,) = fed(stream, deltas(tokens, (), FinishReason.STOP))
    assert whole.finish_reason == "stop" and whole.cuts_call


def test_a_later_piece_of_a_call_has_arguments_alone():
    form = reply()
    chunks(form, ChoiceDelta(0, OutputFields()))
    (chunk,) = chunks(form, ChoiceDelta(0, OutputFields(tool_calls=(ToolCallPiece(1, arguments=" 1}"),))))
    assert chunk["choices"][0]["delta"] == {"tool_calls": [{"index": 1, "function": {"arguments": " 1}"}}]}


def test_each_field_has_a_chunk_of_its_own():
    form = reply()
    parts = fed(choice(logprobs=0), deltas([*ids(REPLY), EOS], (), FinishReason.STOP))
    sent = [chunk["choices"][0] for part in parts for chunk in chunks(form, part)]
    bodies = [chunk["delta"] for chunk in sent]
    assert bodies == [
        {"role": "assistant", "content": "", "refusal": None},
        {"reasoning_content": "3 + 4 is 7.", "reasoning": "3 + 4 is 7."},
        {"content": "It is 7, <think>really</think>."},
        {},
    ]
    told = [entry for chunk in sent if chunk["logprobs"] for entry in chunk["logprobs"]["content"]]
    assert len(told) == len(ids(REPLY)) and [chunk["finish_reason"] for chunk in sent] == [None] * 3 + ["stop"]
