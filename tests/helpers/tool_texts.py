"""What models write when they call tools, in every format: well, and in the ways that they and servers get it wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass

from isotherm.cluster.text.output import OutputFields, ToolCallPiece
from isotherm.cluster.text.tool_formats.base import Tool

WEATHER = Tool(
    "get_weather",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "units": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "fields": {"type": "array", "items": {"type": "string"}},
            "place": {"$ref": "#/$defs/place"},
            "any": {},
        },
        "required": ["city"],
        "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
    },
)
NOW = Tool("now", {"type": "object", "properties": {}})
TOOLS = (WEATHER, NOW)


@dataclass(frozen=True)
class Case:
    form: str
    about: str
    text: str
    content: str
    calls: tuple[tuple[str, str], ...]  # name, arguments
    ids: tuple[str, ...] | None = None  # where the format has its own

    @property
    def fields(self) -> OutputFields:
        ids = self.ids or tuple(f"call_{i}" for i in range(len(self.calls)))
        pieces = (ToolCallPiece(i, ids[i], name, arguments) for i, (name, arguments) in enumerate(self.calls))
        return OutputFields(self.content, tool_calls=tuple(pieces))


def v3(*calls: tuple[str, str]) -> str:
    written = "\n".join(
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    )
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def v31(*calls: tuple[str, str]) -> str:
    written = "".join(f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{a}<｜tool▁call▁end｜>" for n, a in calls)
    return f"<｜tool▁calls▁begin｜>{written}<｜tool▁calls▁end｜>"


def kimi(*calls: tuple[str, str]) -> str:
    written = "".join(
        f"<|tool_call_begin|>{header}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
        for header, arguments in calls
    )
    return f"<|tool_calls_section_begin|>{written}<|tool_calls_section_end|>"


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)


def glm(name: str, *pairs: tuple[str, str], gap: str = "\n") -> str:
    written = "".join(f"<arg_key>{key}</arg_key>{gap}<arg_value>{value}</arg_value>{gap}" for key, value in pairs)
    return f"<tool_call>{name}{gap}{written}</tool_call>"


def coder(name: str, *pairs: tuple[str, str], gap: str = "\n") -> str:
    written = "".join(f"<parameter={key}>{gap}{value}{gap}</parameter>{gap}" for key, value in pairs)
    return f"<tool_call>{gap}<function={name}>{gap}{written}</function>{gap}</tool_call>"


def dsml(*calls: tuple[str, tuple[tuple[str, str, str], ...]], section: str = "function_calls") -> str:
    written = "\n".join(
        f'<｜DSML｜invoke name="{name}">\n'
        + "".join(
            f'<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>\n'
            for key, text, value in pairs
        )
        + "</｜DSML｜invoke>"
        for name, pairs in calls
    )
    return f"<｜DSML｜{section}>\n{written}\n</｜DSML｜{section}>"


CITY = '{"city": "Rome"}'
NESTED = '{"city": "Rome", "place": {"lat": 4.5}}'
LONG = '{"city": "' + "x" * 12_000 + '"}'
MARKS = '{"city": "a \\"quoted\\" {brace} [bracket] \\\\", "days": 3}'
ROME = ("get_weather", CITY)
ROME_NOW = (ROME, ("now", "{}"))

JSON_ARGUMENTS = {  # about what, arguments as written and as they come
    "a string at the end": (CITY, CITY),
    "a number at the end": ('{"days": 123}', '{"days": 123}'),
    "a boolean at the end": ('{"exact": true}', '{"exact": true}'),
    "null at the end": ('{"units": null}', '{"units": null}'),
    "an array at the end": ('{"fields": ["a", "b"]}', '{"fields": ["a", "b"]}'),
    "an object at the end": (NESTED, NESTED),
    "no arguments": ("{}", "{}"),
    "more than any buffer": (LONG, LONG),
    "braces and quotes in strings": (MARKS, MARKS),
    "characters of several bytes": ('{"city": "Zürich 東京 😀"}', '{"city": "Zürich 東京 😀"}'),
    "escapes as they are": ('{"city": "Z\\u00fcrich\\n"}', '{"city": "Z\\u00fcrich\\n"}'),
    "over several lines": ('{\n  "city": "Rome",\n  "days": 2\n}', '{\n  "city": "Rome",\n  "days": 2\n}'),
}


def well_formed() -> list[Case]:
    out = []
    for about, (written, come) in JSON_ARGUMENTS.items():
        calls = (("get_weather", come),)
        out += [
            Case("deepseek_v3", about, v3(("get_weather", written)), "", calls),
            Case("deepseek_v3.1", about, v31(("get_weather", written)), "", calls),
            Case("kimi_k2", about, kimi(("functions.get_weather:0", written)), "", calls, ("functions.get_weather:0",)),
            Case("hermes", about, hermes(("get_weather", written)), "", calls),
        ]
    for form, two, ids in (
        ("deepseek_v3", v3(*ROME_NOW), None),
        ("deepseek_v3.1", v31(*ROME_NOW), None),
        (
            "kimi_k2",
            kimi(("functions.get_weather:0", CITY), ("functions.now:1", "{}")),
            ("functions.get_weather:0", "functions.now:1"),
        ),
        ("hermes", hermes(*ROME_NOW), None),
        ("glm4", glm("get_weather", ("city", "Rome")) + "\n" + glm("now"), None),
        ("qwen3_coder", coder("get_weather", ("city", "Rome")) + "\n" + coder("now"), None),
        ("deepseek_v3.2", dsml(("get_weather", (("city", "true", "Rome"),)), ("now", ())), None),
    ):
        out += [
            Case(form, "two calls", two, "", ROME_NOW, ids),
            Case(form, "text before", "Let me see.\n\n" + two, "Let me see.", ROME_NOW, ids),
            Case(form, "white space only", "\n\n" + two + "\n", "", ROME_NOW, ids),
            Case(form, "text after", two + "\nDone.", "\nDone.", ROME_NOW, ids),
            Case(form, "text around", "First. " + two + "\nThen.", "First. \nThen.", ROME_NOW, ids),
            Case(form, "text alone", " 3 < 4 {and} more\n", " 3 < 4 {and} more\n", ()),
        ]
    return out


VALUES = (  # key, value as written, its JSON
    ("city", '2>&1 </b> "x" \\ \n\ty', '"2>&1 </b> \\"x\\" \\\\ \\n\\ty"'),
    ("city", "42", '"42"'),
    ("city", "", '""'),
    ("days", "3", "3"),
    ("days", " 3 ", "3"),
    ("days", "three", '"three"'),
    ("exact", "true", "true"),
    ("exact", "True", "true"),
    ("units", "null", "null"),
    ("units", "7", '"7"'),
    ("fields", '["a", 1]', '["a", 1]'),
    ("fields", "['a', 1]", '["a", 1]'),
    ("fields", "['\\ud83d']", "\"['\\\\ud83d']\""),
    ("any", "'\\ud83d'", "\"'\\\\ud83d'\""),
    ("place", '{"lat": 4.5}', '{"lat": 4.5}'),
    ("any", "5", "5"),
    ("any", "five", '"five"'),
    ("unknown", "5", "5"),
)


def by_pairs() -> list[Case]:
    out = []
    for key, written, come in VALUES:
        calls = (("get_weather", f'{{"{key}": {come}}}'),)
        about = f"{key} is {written!r}"
        out += [
            Case("glm4", about, glm("get_weather", (key, written)), "", calls),
            Case("glm4", about + ", on one line", glm("get_weather", (key, written), gap=""), "", calls),
        ]
        untyped = key in ("any", "unknown")  # where the schema says nothing, it is text
        text = (("get_weather", json.dumps({key: written})),) if untyped else calls
        out += [
            Case("qwen3_coder", about, coder("get_weather", (key, written)), "", text),
            Case("qwen3_coder", about + ", on one line", coder("get_weather", (key, written), gap=""), "", text),
        ]
        said = "true" if key == "city" else "false"
        if key != "units":
            out.append(Case("deepseek_v3.2", about, dsml(("get_weather", ((key, said, written),))), "", calls))
    city_days = (("get_weather", '{"city": "Rome", "days": 3}'),)
    return [
        *out,
        Case("glm4", "several", glm("get_weather", ("city", "Rome"), ("days", "3")), "", city_days),
        Case("qwen3_coder", "several", coder("get_weather", ("city", "Rome"), ("days", "3")), "", city_days),
        Case("qwen3_coder", "no arguments on one line", coder("now", gap=""), "", (("now", "{}"),)),
        Case("glm4", "no arguments on one line", "<tool_call>now</tool_call>", "", (("now", "{}"),)),
        Case(
            "deepseek_v3.2",
            "several",
            dsml(("get_weather", (("city", "true", "Rome"), ("days", "false", "3")))),
            "",
            city_days,
        ),
        Case("deepseek_v3.2", "V4's section", dsml(("now", ()), section="tool_calls"), "", (("now", "{}"),)),
        Case(
            "deepseek_v3.2",
            "text though the schema has none",
            dsml(("get_weather", (("days", "true", "3"),))),
            "",
            (("get_weather", '{"days": "3"}'),),
        ),
        Case(
            "deepseek_v3.2",
            "an object for parameters",
            f'<｜DSML｜invoke name="get_weather">\n{CITY}\n</｜DSML｜invoke>',
            "",
            (ROME,),
        ),
    ]


CALL, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
SECTION, SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
INVOKE, INVOKE_END = '<｜DSML｜invoke name="get_weather">', "</｜DSML｜invoke>"
PARAMETER, PARAMETER_END = '<｜DSML｜parameter name="city" string="true">', "</｜DSML｜parameter>"
BLOCK, BLOCK_END = "<｜DSML｜function_calls>\n", "\n</｜DSML｜function_calls>"
SPOKEN = f'{{"city": "{CALL}x{SEP}y{END} and {SECTION_END}."}}'
FENCED = '{"city": "so:\n```python\nx\n```."}'  # with raw line ends, which are no JSON
K_ARG, K_CALL, K_END = "<|tool_call_argument_begin|>", "<|tool_call_begin|>", "<|tool_call_end|>"
K_ID = ("functions.get_weather:0",)
CODER, CODER_END = "<tool_call>\n<function=get_weather>\n", "</function>\n</tool_call>"
CODER_CITY = "<parameter=city>\nRome\n</parameter>\n"
CODER_WRONG = (  # about, text, content, calls
    ("no tag around it", f"Look: <function=get_weather>\n{CODER_CITY}</function>", "Look:", (ROME,)),
    ("its end alone", f"<function=get_weather>\n{CODER_CITY}{CODER_END}\nSo.", "\nSo.", (ROME,)),
    ("two functions in one tag", f"{CODER}{CODER_CITY}</function>\n<function=now>\n{CODER_END}", "", ROME_NOW),
    ("no end", CODER + CODER_CITY, "", (ROME,)),
    ("no end of the function", f"{CODER}{CODER_CITY}</tool_call>", "", (ROME,)),
    ("no end of a value", f"{CODER}<parameter=city>\nRome\n{CODER_END}", "", (ROME,)),
    ("no end of a value on one line", f"{CODER}<parameter=city>Rome</function></tool_call>", "", (ROME,)),
    (
        "no end of one of two values",
        f"{CODER}<parameter=city>\nRome\n<parameter=days>\n3\n</parameter>\n{CODER_END}",
        "",
        (("get_weather", '{"city": "Rome", "days": 3}'),),
    ),
    ("the next without an end", CODER + CODER_CITY + coder("now"), "", ROME_NOW),
    (
        "no brackets",
        f"{CODER}{CODER_CITY}{CODER_END}".replace("weather>", "weather").replace("city>", "city"),
        "",
        (ROME,),
    ),
    ("cut off in a string", f"{CODER}<parameter=city>\nRo", "", (("get_weather", '{"city": "Ro'),)),
    ("cut off in an end", f"{CODER}<parameter=city>\nRo\n</par", "", (("get_weather", '{"city": "Ro\\n</par'),)),
    ("cut off in another value", f"{CODER}<parameter=days>\n1", "", (("get_weather", '{"days": 1'),)),
    ("cut off in a key", f"{CODER}<parameter=ci", "<parameter=ci", (("get_weather", "{}"),)),
    ("cut off in the name", "<tool_call>\n<function=get_wea", "<tool_call>\n<function=get_wea", ()),
    ("cut off before the name", "So.\n<tool_call>\n<func", "So.\n<tool_call>\n<func", ()),
    (
        "tags in a string",
        coder("get_weather", ("city", "a </parameter> b </function>\n <parameter=x> c")),
        "",
        (("get_weather", '{"city": "a </parameter> b </function>\\n <parameter=x> c"}'),),
    ),
    (
        "line ends of a string's own",
        coder("get_weather", ("city", "\n\ta\n\n")),
        "",
        (("get_weather", '{"city": "\\n\\ta\\n\\n"}'),),
    ),
    ("null as Python has it", coder("get_weather", ("units", "None")), "", (("get_weather", '{"units": null}'),)),
    (
        "an object as Python has it",
        coder("get_weather", ("place", "{'lat': 4.5}")),
        "",
        (("get_weather", '{"place": {"lat": 4.5}}'),),
    ),
    ("the tag spoken of", "Write <tool_call> first.\nThen more.", "Write <tool_call> first.\nThen more.", ()),
    ("the function spoken of", "Write <function=NAME> and so on.", "Write <function=NAME> and so on.", ()),
    ("a stray tag before", "So <tool_call> I think " + coder("now"), "So <tool_call> I think", (("now", "{}"),)),
    ("Hermes' form", hermes(ROME), hermes(ROME), ()),
    ("no tool of that name", coder("fly", ("city", "Rome")), "", (("fly", CITY),)),
    ("text in a call", f"<tool_call>\n<function=now>\nhm{CODER_END}", "hm", (("now", "{}"),)),
)

WRONG = [
    # DeepSeek-V3 and V3.1
    Case("deepseek_v3", "V3.1's form", v31(ROME), "", (ROME,)),
    Case("deepseek_v3.1", "V3's form", v3(ROME), "", (ROME,)),
    Case("deepseek_v3", "no section", f"{CALL}function{SEP}now\n```json\n{{}}\n```{END}", "", (("now", "{}"),)),
    Case("deepseek_v3", "no fence", f"{SECTION}{CALL}function{SEP}get_weather\n{CITY}{END}{SECTION_END}", "", (ROME,)),
    Case(
        "deepseek_v3",
        "no separator",
        f"{SECTION}{CALL}get_weather\n```json\n{CITY}\n```{END}{SECTION_END}",
        "",
        (ROME,),
    ),
    Case("deepseek_v3", "nor a space", f"{SECTION}{CALL}functionget_weather\n```json\n{CITY}\n```{END}", "", (ROME,)),
    Case(
        "deepseek_v3",
        "the end in the fence",
        f'{SECTION}{CALL}function{SEP}get_weather\n```json\n{{"city": "Ro\n```{END}{SECTION_END}',
        "",
        (("get_weather", '{"city": "Ro'),),
    ),
    Case("deepseek_v3.1", "no separator", f"{SECTION}{CALL}get_weather{CITY}{END}{SECTION_END}", "", (ROME,)),
    Case("deepseek_v3.1", "a name alone", f"{SECTION}{CALL}now{END}{SECTION_END}", "", (("now", "{}"),)),
    Case(
        "deepseek_v3.1",
        "nothing after the separator",
        f"{SECTION}{CALL}now{SEP}{END}{SECTION_END}",
        "",
        (("now", "{}"),),
    ),
    Case(
        "deepseek_v3.1",
        "no end of a call",
        f"{SECTION}{CALL}get_weather{SEP}{CITY}{CALL}now{SEP}{{}}{SECTION_END}",
        "",
        ROME_NOW,
    ),
    Case("deepseek_v3.1", "no end at all", f"{SECTION}{CALL}get_weather{SEP}{CITY}", "", (ROME,)),
    Case(
        "deepseek_v3.1",
        "text instead of an end",
        f"{SECTION}{CALL}get_weather{SEP}{CITY}\nIt rains.",
        "\nIt rains.",
        (ROME,),
    ),
    Case(
        "deepseek_v3.1",
        "text after a call",
        f"{SECTION}{CALL}now{SEP}{{}} wait{END}{SECTION_END}",
        " wait",
        (("now", "{}"),),
    ),
    Case(
        "deepseek_v3.1", "text in a section", f"{SECTION}hm{CALL}now{SEP}{{}}{END}{SECTION_END}", "hm", (("now", "{}"),)
    ),
    Case("deepseek_v3.1", "a section without calls", f"so {SECTION}no calls{SECTION_END}", "so no calls", ()),
    Case("deepseek_v3.1", "ends twice", f"{v31(ROME)}{END}x", f"{END}x", (ROME,)),
    Case(
        "deepseek_v3.1",
        "an end in a string",
        f'{SECTION}{CALL}get_weather{SEP}{{"city": "Ro{END}{SECTION_END}',
        "",
        (("get_weather", '{"city": "Ro'),),
    ),
    Case(
        "deepseek_v3.1",
        "no JSON",
        f"{SECTION}{CALL}get_weather{SEP}city=Rome{END}{SECTION_END}",
        "",
        (("get_weather", "city=Rome"),),
    ),
    Case(
        "deepseek_v3.1",
        "cut off in the arguments",
        f'{SECTION}{CALL}get_weather{SEP}{{"city": "Ro',
        "",
        (("get_weather", '{"city": "Ro'),),
    ),
    Case("deepseek_v3.1", "cut off in the name", f"hm {SECTION}{CALL}get_wea", "hm get_wea", ()),
    Case("deepseek_v3", "cut off in the name", f"{SECTION}{CALL}function{SEP}get_wea", "function", ()),
    Case("deepseek_v3.1", "cut off in a marker", "hm <｜tool▁ca", "hm <｜tool▁ca", ()),
    Case("deepseek_v3.1", "no tool of that name", v31(("fly", CITY)), "", (("fly", CITY),)),
    Case("deepseek_v3.1", "no name", f"{SECTION}{CALL}{SEP}{CITY}{END}{SECTION_END}", CITY, ()),
    Case(
        "deepseek_v3.1",
        "markers in a string",
        v31(("get_weather", SPOKEN), ("now", "{}")),
        "",
        (("get_weather", SPOKEN), ("now", "{}")),
    ),
    Case(
        "deepseek_v3",
        "a fence in a string",
        v3(("get_weather", FENCED), ("now", "{}")),
        "",
        (("get_weather", FENCED), ("now", "{}")),
    ),
    # Kimi K2
    Case(
        "kimi_k2",
        "lines between",
        f"<|tool_calls_section_begin|>\n{K_CALL}\nfunctions.get_weather:0\n{K_ARG}\n{CITY}\n{K_END}\n<|tool_calls_section_end|>",
        "",
        (ROME,),
        K_ID,
    ),
    Case(
        "kimi_k2",
        "the other section",
        f"<|tool_call_section_begin|>{K_CALL}functions.get_weather:0{K_ARG}{CITY}{K_END}<|tool_call_section_end|>x",
        "x",
        (ROME,),
        K_ID,
    ),
    Case("kimi_k2", "no section", f"{K_CALL}functions.get_weather:0{K_ARG}{CITY}{K_END}", "", (ROME,), K_ID),
    Case("kimi_k2", "no index", kimi(("functions.get_weather", CITY)), "", (ROME,), K_ID),
    Case("kimi_k2", "no prefix", kimi(("get_weather:4", CITY)), "", (ROME,), ("functions.get_weather:4",)),
    Case(
        "kimi_k2",
        "an index twice",
        kimi(("functions.now:0", "{}"), ("functions.now:0", "{}")),
        "",
        (("now", "{}"), ("now", "{}")),
        ("functions.now:0", "functions.now:1"),
    ),
    Case(
        "kimi_k2",
        "a name with dots and colons",
        kimi(("functions.mcp.a:b:12", "{}")),
        "",
        (("mcp.a:b", "{}"),),
        ("functions.mcp.a:b:12",),
    ),
    Case(
        "kimi_k2",
        "text in a section",
        f"<|tool_calls_section_begin|> spurious {K_CALL}functions.now:0{K_ARG}{{}}{K_END}",
        " spurious",
        (("now", "{}"),),
        ("functions.now:0",),
    ),
    Case(
        "kimi_k2",
        "an index of more digits than any int is read from",
        kimi((f"functions.now:{'7' * 5000}", "{}")),
        "",
        ((f"now:{'7' * 5000}", "{}"),),
        (f"functions.now:{'7' * 5000}:0",),
    ),
    Case("kimi_k2", "a counter that names none of two", kimi(("0", CITY)), f"0{CITY}", ()),
    # Hermes
    Case(
        "hermes", "on one line", f'<tool_call>{{"name": "get_weather", "arguments": {CITY}}}</tool_call>', "", (ROME,)
    ),
    Case(
        "hermes",
        "arguments first",
        f'<tool_call>{{"arguments": {CITY}, "name": "get_weather"}}</tool_call>',
        "",
        (ROME,),
    ),
    Case(
        "hermes", "parameters", f'<tool_call>{{"name": "get_weather", "parameters": {CITY}}}</tool_call>', "", (ROME,)
    ),
    Case(
        "hermes",
        "further members",
        f'<tool_call>{{"id": 4, "name": "get_weather", "x": {{"y": [1]}}, "arguments": {CITY}}}</tool_call>',
        "",
        (ROME,),
    ),
    Case(
        "hermes",
        "JSON in a string",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
        "",
        (ROME,),
    ),
    Case("hermes", "half a surrogate pair in a name", hermes(("a\\ud83d", "{}")), "", (("a\\ud83d", "{}"),)),
    Case("hermes", "a surrogate pair in a name", hermes(("a\\ud83d\\ude00", "{}")), "", (("a😀", "{}"),)),
    Case(
        "hermes",
        "half a surrogate pair in a string of arguments",
        '<tool_call>{"name": "get_weather", "arguments": "[\\"\\ud83d\\"]"}</tool_call>',
        "",
        (("get_weather", '[\\"\\ud83d\\"]'),),
    ),
    Case("hermes", "no arguments", '<tool_call>\n{"name": "now"}\n</tool_call>', "", (("now", "{}"),)),
    Case(
        "hermes",
        "the end in a string",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "a</tool_call>b"}}\n</tool_call>',
        "",
        (("get_weather", '{"city": "a</tool_call>b"}'),),
    ),
    Case(
        "hermes",
        "a string without its end",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ro</tool_call>\n' + hermes(("now", "{}")),
        "",
        (("get_weather", '{"city": "Ro'), ("now", "{}")),
    ),
    Case("hermes", "no end", f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n', "", (ROME,)),
    Case(
        "hermes",
        "no end between",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n' + hermes(("now", "{}")),
        "",
        ROME_NOW,
    ),
    Case(
        "hermes",
        "a brace too many",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}}}\n</tool_call>',
        "}\n",
        (ROME,),
    ),
    Case("hermes", "the tag spoken of", "Write <tool_call> and {json}.", "Write <tool_call> and {json}.", ()),
    Case("hermes", "a stray tag before", "So <tool_call> I think " + hermes(ROME), "So <tool_call> I think", (ROME,)),
    Case(
        "hermes",
        "no name",
        '<tool_call>\n{"arguments": {}}\n</tool_call> x',
        '<tool_call>\n{"arguments": {}}\n</tool_call> x',
        (),
    ),
    Case("hermes", "no JSON", "<tool_call>\n{name: now}\n</tool_call>", "<tool_call>\n{name: now}\n</tool_call>", ()),
    Case("hermes", "cut off in the name", '<tool_call>\n{"name": "get_w', '<tool_call>\n{"name": "get_w', ()),
    Case(
        "hermes",
        "cut off in the arguments",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "R',
        "",
        (("get_weather", '{"city": "R'),),
    ),
    Case("hermes", "no tool of that name", hermes(("fly", CITY)), "", (("fly", CITY),)),
    # GLM
    Case(
        "glm4", "no end", "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n", "", (ROME,)
    ),
    Case(
        "glm4",
        "cut off in a string",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Ro",
        "",
        (("get_weather", '{"city": "Ro'),),
    ),
    Case(
        "glm4",
        "cut off in another value",
        "<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>1",
        "",
        (("get_weather", '{"days": 1'),),
    ),
    Case("glm4", "cut off in the name", "<tool_call>get_wea", "<tool_call>get_wea", ()),
    Case(
        "glm4",
        "no end of a value",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Rome</tool_call>",
        "",
        (ROME,),
    ),
    Case(
        "glm4",
        "no end of a key",
        "<tool_call>get_weather<arg_key>city<arg_value>Rome</arg_value></tool_call>",
        "",
        (ROME,),
    ),
    Case(
        "glm4",
        "the next without an end",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n" + glm("now"),
        "",
        ROME_NOW,
    ),
    Case(
        "glm4",
        "a key alone",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n</tool_call>",
        "",
        (("get_weather", "{}"),),
    ),
    Case(
        "glm4", "the tag spoken of", "Write <tool_call> first.\nThen more.", "Write <tool_call> first.\nThen more.", ()
    ),
    Case("glm4", "no tool of that name", glm("fly", ("city", "Rome")), "", (("fly", CITY),)),
    Case("glm4", "text in a call", "<tool_call>now\nhm</tool_call>", "\nhm", (("now", "{}"),)),
    # DSML
    Case("deepseek_v3.2", "no section", '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>', "", (("now", "{}"),)),
    Case("deepseek_v3.2", "no end", f"{BLOCK}{INVOKE}\n{PARAMETER}Rome{PARAMETER_END}\n", "", (ROME,)),
    Case(
        "deepseek_v3.2",
        "no end of an invoke",
        f"{BLOCK}{INVOKE}\n{PARAMETER}Rome{PARAMETER_END}\n" + dsml(("now", ())).removeprefix(BLOCK),
        "",
        ROME_NOW,
    ),
    Case("deepseek_v3.2", "no end of a parameter", f"{INVOKE}{PARAMETER}Rome{INVOKE_END}", "", (ROME,)),
    Case(
        "deepseek_v3.2",
        "nothing said of the type",
        dsml(("get_weather", (("city", "?", "4"), ("days", "?", "3")))).replace(' string="?"', ""),
        "",
        (("get_weather", '{"city": "4", "days": 3}'),),
    ),
    Case(
        "deepseek_v3.2",
        "cut off in a string",
        f"{INVOKE}{PARAMETER}Ro</｜DS",
        "",
        (("get_weather", '{"city": "Ro</｜DS'),),
    ),
    Case("deepseek_v3.2", "cut off in the name", f"x\n{BLOCK}{INVOKE[:-6]}", f"x\n\n{INVOKE[:-6]}", ()),
    Case("deepseek_v3.2", "cut off in a tag", f"{INVOKE}{PARAMETER}Rome{PARAMETER_END}{PARAMETER[:-4]}", "", (ROME,)),
    Case("deepseek_v3.2", "no tool of that name", dsml(("fly", (("city", "true", "Rome"),))), "", (("fly", CITY),)),
    Case("deepseek_v3.2", "text in an invoke", f"{INVOKE}\nhm{INVOKE_END}", "hm", (("get_weather", "{}"),)),
]

CASES = [*well_formed(), *by_pairs(), *WRONG, *(Case("qwen3_coder", *wrong) for wrong in CODER_WRONG)]
