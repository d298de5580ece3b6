"""What the grammars of calls let a model write: what the parsers read, and nothing that its tool does not take."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from grammars import accepts, tiny_tokenizer, tiny_vocabulary
from tool_schemas import random_tools
from tool_texts import CITY, NOW, TOOLS, WEATHER, coder, dsml, glm, hermes, kimi, v3, v31

from isotherm.cluster.text.json_schema import GrammarError
from isotherm.cluster.text.output import OutputFields, joined
from isotherm.cluster.text.tool_formats.base import Offer, Tool
from isotherm.cluster.text.tool_formats.grammar import ToolSchemaError
from isotherm.cluster.text.tool_formats.output_grammar import grammar_of_calls
from isotherm.cluster.text.tool_formats.registry import TOOL_FORMATS

every_format = pytest.mark.parametrize("form", sorted(TOOL_FORMATS))
STRICT = [replace(tool, strict=True) for tool in TOOLS]
PAIRS = ("glm4", "qwen3_coder", "deepseek_v3.2")


def grammar(form, tools=TOOLS, *, must_call=True, parallel=True, answer=""):
    control = tiny_tokenizer().control_tokens
    return grammar_of_calls(TOOL_FORMATS[form], tools, control, must_call=must_call, parallel=parallel, answer=answer)


def parse(form, text, tools=TOOLS):
    parser = TOOL_FORMATS[form].parser(Offer(tools, "call_{}".format))
    return joined([parser.feed(text), parser.finish()])


def write(form, *calls):
    """Calls as the format has them: (name, {argument: value})."""
    if form in ("glm4", "qwen3_coder"):
        as_text = [(name, [(k, v if isinstance(v, str) else json.dumps(v)) for k, v in a.items()]) for name, a in calls]
        call = glm if form == "glm4" else coder
        return "\n".join(call(name, *pairs) for name, pairs in as_text)
    if form == "deepseek_v3.2":
        typed = [
            (
                name,
                tuple(
                    (k, str(isinstance(v, str)).lower(), v if isinstance(v, str) else json.dumps(v))
                    for k, v in a.items()
                ),
            )
            for name, a in calls
        ]
        return dsml(*typed)
    dumped = [(name, json.dumps(arguments)) for name, arguments in calls]
    if form == "kimi_k2":
        return kimi(*((f"functions.{name}:{i}", arguments) for i, (name, arguments) in enumerate(dumped)))
    return {"deepseek_v3": v3, "deepseek_v3.1": v31, "hermes": hermes}[form](*dumped)


ROME = ("get_weather", {"city": "Rome", "days": 3})


@every_format
def test_what_must_call_calls_by_the_schema(form):
    required = grammar(form)
    assert accepts(required, write(form, ROME))
    assert accepts(required, write(form, ROME, ("now", {}), ("get_weather", {"city": "x", "exact": True})))
    for wrong in (
        write(form, ("fly", {"city": "Rome"})),
        write(form, ("get_weather", {"days": 3})),
        write(form, ("get_weather", {"city": "Rome", "planet": "Mars"})),
        write(form, ("get_weather", {"city": "Rome", "days": 0.5})),
        write(form, ("now", {"city": "Rome"})),
        write(form, ROME) + "Done.",
        "Let me see. " + write(form, ROME),
        "No.",
        "",
    ):
        assert not accepts(required, wrong), wrong


@every_format
def test_without_parallel_calls_there_is_one(form):
    one = grammar(form, parallel=False)
    assert accepts(one, write(form, ROME)) and not accepts(one, write(form, ROME, ("now", {})))


@every_format
def test_a_strict_tool_leaves_text_free_and_calls_bound(form):
    auto = grammar(form, [STRICT[0], NOW], must_call=False)
    assert accepts(auto, "It is 7 < 8 {so}.\n") and accepts(auto, "")
    assert accepts(auto, "Let me see.\n\n" + write(form, ROME)) and accepts(auto, write(form, ROME))
    assert accepts(auto, write(form, ("now", {"zone": "UTC"})))  # which is not strict
    for wrong in (("get_weather", {"days": 3}), ("get_weather", {"city": "x", "planet": "Mars"}), ("fly", {})):
        assert not accepts(auto, "So. " + write(form, wrong)), wrong


@every_format
def test_an_answer_of_a_form_may_stand_in_place_of_calls(form):
    answer = 'start: "yes" | "no"'
    either = grammar(form, must_call=False, answer=answer)
    assert accepts(either, "yes") and accepts(either, write(form, ROME))
    assert not accepts(either, "maybe") and not accepts(either, "yes" + write(form, ROME))


def random_text(text, r):
    """What a model that knows nothing writes, which likes ends: None where it comes to none."""
    vocabulary, tokenizer = tiny_vocabulary(), tiny_tokenizer()
    likes = set(tokenizer.control_tokens.values())
    likes |= {id_ for id_ in range(tokenizer.vocab_size) if tokenizer.token_bytes(id_) in _ENDS}
    matcher = vocabulary.compiled(text).copy()
    assert not matcher.is_error(), matcher.get_error()
    ids = []
    while len(ids) < 400:
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        allowed = np.flatnonzero(mask)
        assert allowed.size
        if mask[vocabulary.eos]:
            return tokenizer.decode(ids, skip_special_tokens=False)
        liked = sorted(id_ for id_ in likes if mask[id_])
        token = r.choice(liked) if liked and r.random() < 0.4 else int(allowed[r.randrange(allowed.size)])
        assert matcher.consume_token(token)
        ids.append(token)
    return None


_ENDS = {b'"', b"}", b"]", b"<", b"</", b'"}', b'": '}


@every_format
def test_whatever_is_written_by_the_grammar_is_calls_that_fit(form):
    r = random.Random(form)
    finished = 0
    for _ in range(25):
        tools = random_tools(r)
        text = random_text(grammar(form, tools, parallel=r.random() < 0.5), r)
        if text is None:
            continue
        finished += 1
        fields = parse(form, text, tools)
        assert fields.tool_calls and fields == OutputFields(tool_calls=fields.tool_calls), text
        by_name = {tool.name: tool for tool in tools}
        for call in fields.tool_calls:
            jsonschema.validate(json.loads(call.arguments), by_name[call.name].parameters)
    assert finished > 12


@pytest.mark.parametrize("form", PAIRS)
@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"type": "object", "anyOf": [{"required": ["a"]}]}, "'anyOf' beside"),
        ({"properties": {"a": {"type": "string", "pattern": "x+"}}}, "'pattern' of its string 'a'"),
        ({"properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
        ({"properties": {"a>": {}}}, "'a>' cannot stand in a tag"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#/properties/a"}}}}, "#/properties/a"),
    ],
)
def test_what_pairs_cannot_enforce_is_refused_by_name(form, parameters, words):
    with pytest.raises(ToolSchemaError, match=words) as info:
        grammar(form, [WEATHER, Tool("f", parameters)])
    assert info.value.tool == "f"


def test_bare_text_that_could_be_two_things_is_refused():
    either = {"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "object"}]}}}
    for form in ("glm4", "qwen3_coder"):
        with pytest.raises(ToolSchemaError, match="does not tell apart"):
            grammar(form, [Tool("f", either)])
    assert accepts(grammar("deepseek_v3.2", [Tool("f", either)]), write("deepseek_v3.2", ("f", {"a": {}})))
    optional = {"properties": {"a": {"type": ["string", "null"]}}, "required": ["a"]}
    for form in PAIRS:
        for value in ("text", None):
            assert accepts(grammar(form, [Tool("f", optional)]), write(form, ("f", {"a": value})))


@every_format
def test_a_keyword_that_nobody_enforces_is_refused_by_name(form):
    tool = Tool("f", {"type": "object", "properties": {"a": {"type": "object", "not": {}}}})
    with pytest.raises(GrammarError, match="'not'"):
        grammar(form, [tool])


@every_format
def test_arguments_without_a_schema_are_any(form):
    free = grammar(form, [Tool("f")])
    assert accepts(free, write(form, ("f", {"a": "x", "b c": "y"}))) and accepts(free, write(form, ("f", {})))


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("glm4", "<b>x</b> </arg_value <tool"),
        ("qwen3_coder", "<function=f>\n <parameter=a> </parameter> </function>\n</parameter <tool"),
    ],
)
def test_a_string_may_hold_markers_that_are_text(form, said):
    written = write(form, ("get_weather", {"city": said}))
    assert accepts(grammar(form), written)
    assert parse(form, written).tool_calls[0].arguments == json.dumps({"city": said})
    assert CITY
