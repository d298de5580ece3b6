"""Small chat templates that do to messages what those of the model families do, and a tokenizer with their markers.

None is a published one: each has the operations that matter here (what is concatenated, split, trimmed, dumped)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fake_engine import write_tokenizer
from tokenizers import AddedToken, Tokenizer

MARKERS = [
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁output▁begin｜>",
    "<｜tool▁output▁end｜>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_user|>",
    "<|im_assistant|>",
    "<|im_system|>",
    "<|im_middle|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "<tool_call>",
    "</tool_call>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "[gMASK]",
    "</think>",
]

# DeepSeek-R1: a call's arguments are concatenated as text, a message without content has the calls, the last thought is
# cut off by a split, and the prompt opens the next one.
R1 = """
{%- set ns = namespace(system='', tool=false) -%}
{%- for m in messages if m['role'] == 'system' -%}{%- set ns.system = ns.system + m['content'] -%}{%- endfor -%}
{{- bos_token }}{{ ns.system }}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}{%- set ns.tool = false -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'assistant' and m['content'] is none -%}
    {{- '<｜Assistant｜><｜tool▁calls▁begin｜>' -}}
    {%- for c in m['tool_calls'] -%}
      {{- '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n'
          + c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜>' + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'assistant' and m['content'] is not none -%}
    {%- set content = m['content'] -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
    {{- ('' if ns.tool else '<｜Assistant｜>') + content + eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}
    {%- set ns.tool = true -%}{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
  {%- endif -%}
{%- endfor -%}
{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

# DeepSeek-R1-0528: the user's turn opens the assistant's, and the model its thought, of which the template has the end
# alone. The first of R1 is alike in this.
R1_0528 = """
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}{{- m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] + '<｜Assistant｜>' -}}{%- endif -%}
  {%- if m['role'] == 'assistant' -%}
    {%- set content = m['content'] or '' -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1] -%}{%- endif -%}
    {{- content -}}
    {%- if m['tool_calls'] is defined and m['tool_calls'] is not none -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for c in m['tool_calls'] -%}
        {{- '<｜tool▁call▁begin｜>' + c['type'] + '<｜tool▁sep｜>' + c['function']['name'] + '\\n```json\\n'
            + c['function']['arguments'] + '\\n```<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] == 'assistant' -%}{{- '<｜Assistant｜>' -}}{%- endif -%}
"""

# DeepSeek-V3.1: `thinking` opens a thought or closes it, a prefix may be a thought.
V3_1 = """
{%- if thinking is not defined -%}{%- set thinking = false -%}{%- endif -%}
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m['role'] == 'system' -%}{{- m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'user' -%}{{- '<｜User｜>' + m['content'] -}}{%- endif -%}
  {%- if m['role'] == 'assistant' -%}
    {{- '<｜Assistant｜>' + ('<think>' if m['prefix'] is defined and m['prefix'] and thinking else '</think>') -}}
    {%- set content = m['content'] or '' -%}
    {%- if '</think>' in content -%}{%- set content = content.split('</think>', 1)[1] -%}{%- endif -%}
    {{- content -}}
    {%- if m['tool_calls'] is defined and m['tool_calls'] is not none -%}
      {{- '<｜tool▁calls▁begin｜>' -}}
      {%- for c in m['tool_calls'] -%}
        {{- '<｜tool▁call▁begin｜>' + c['function']['name'] + '<｜tool▁sep｜>' + c['function']['arguments']
            + '<｜tool▁call▁end｜>' -}}
      {%- endfor -%}
      {{- '<｜tool▁calls▁end｜>' -}}
    {%- endif -%}
    {{- eos_token -}}
  {%- endif -%}
  {%- if m['role'] == 'tool' -%}{{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') -}}{%- endif -%}
"""

# Kimi K2: macros, roles and names as text of their own, arguments in either form, loops that break.
KIMI = """
{%- macro content_of(m) -%}{%- set c = m.get('content') -%}{%- if c is string -%}{{ c }}{%- endif -%}{%- endmacro -%}
{%- macro header(m) -%}
  {%- set name = m.get('name') or m['role'] -%}
  {%- if m['role'] == 'user' -%}<|im_user|>{{ name }}<|im_middle|>
  {%- elif m['role'] == 'assistant' -%}<|im_assistant|>{{ name }}<|im_middle|>
  {%- else -%}<|im_system|>{{ name }}<|im_middle|>{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1) -%}
{%- for i in range(messages|length - 1, -1, -1) -%}
  {%- if messages[i]['role'] == 'assistant' and not messages[i].get('tool_calls') -%}
    {%- set ns.last = i -%}{%- break -%}
  {%- endif -%}
{%- endfor -%}
{%- if tools -%}<|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>{%- endif -%}
{%- for m in messages -%}
  {{ header(m) }}
  {%- if m['role'] == 'assistant' -%}
    <think>{{ m.get('reasoning_content', '') if loop.index0 > ns.last else '' }}</think>{{ content_of(m) }}
    {%- for c in m.get('tool_calls') or [] -%}
      <tool_call>{{ c['id'] }}<|im_middle|>
      {%- if c['function']['arguments'] is string -%}{{ c['function']['arguments'] }}
      {%- else -%}{{ c['function']['arguments'] | tojson }}{%- endif -%}</tool_call>{{ c['function']['name'] }}
    {%- endfor -%}
  {%- elif m['role'] == 'tool' -%}## Return of {{ m.tool_call_id }}\\n{{ content_of(m) }}
  {%- else -%}{{ content_of(m) }}{%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}
"""

# GLM-4.x: goes through the items of an object of arguments, trims, and closes an empty thought when it is to be off.
GLM = """[gMASK]
{%- for tool in tools or [] %}{{ '\\n' + (tool | tojson(ensure_ascii=False)) }}{% endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}<|user|>
{{ m.content }}
  {%- elif m.role == 'assistant' -%}<|assistant|>
    {%- set thought, content = '', m.content -%}
    {%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '\\n<think>' + thought.strip() + '</think>' -}}
    {%- if content.strip() -%}{{- '\\n' + content.strip() -}}{%- endif -%}
    {%- for c in m.tool_calls or [] -%}
      {{- '\\n<tool_call>' + c.function.name -}}
      {%- set args = c.function.arguments or {} -%}
      {%- for k, v in args.items() %}
<arg_key>{{ k }}</arg_key><arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
      {%- endfor %}
</tool_call>
    {%- endfor -%}
  {%- elif m.role == 'tool' -%}<|observation|>
{{ m.content }}
  {%- else -%}<|system|>
{{ m.content }}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '\\n<think></think>' -}}{%- endif -%}
{%- endif -%}
"""

# Hermes and Qwen: arguments are dumped again, so that text would be quoted twice; a date; documents.
HERMES = """
{%- if tools %}
{{- '<|im_start|>system\\nToday is ' + strftime_now('%Y') }}
{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson(indent=2) }}{% endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for d in documents or [] %}{{- '[' ~ d.title ~ '] ' ~ d.text | upper ~ '\\n' }}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' }}{% generation %}{{ m.content | trim if m.content else '' }}{% endgeneration %}
{%- for c in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' ~ c.function.name ~ '", "arguments": ' ~ (c.function.arguments | tojson) ~ '}' }}
{{- '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Qwen3-Coder and JoyAI-LLM-Flash: goes through the items of an object of arguments with a filter, writes values that
# are none of JSON's containers as Python does, and tools in tags, with whatever else their schemas have.
QWEN3_CODER = """
{%- macro others(fields, handled) -%}
  {%- if fields is mapping -%}
    {%- for key in fields if key not in handled -%}
      {%- if fields[key] is mapping or (fields[key] is sequence and fields[key] is not string) -%}
        {{- '\\n<' ~ key ~ '>' ~ (fields[key] | tojson | safe) ~ '</' ~ key ~ '>' -}}
      {%- else -%}
        {{- '\\n<' ~ key ~ '>' ~ (fields[key] | string) ~ '</' ~ key ~ '>' -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools is iterable and tools | length > 0 %}
{{- '<|im_start|>system\\n<tools>' }}
{%- for tool in tools %}
{%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
{{- '\\n<function>\\n<name>' ~ tool.name ~ '</name>' }}
{%- if tool.description is defined %}
{{- '\\n<description>' ~ (tool.description | trim) ~ '</description>' }}
{%- endif %}
{{- '\\n<parameters>' }}
{%- if tool.parameters is mapping and tool.parameters.properties is mapping %}
{%- for name, fields in tool.parameters.properties | items %}
{{- '\\n<parameter>\\n<name>' ~ name ~ '</name>' }}{{- others(fields, ['name']) }}{{- '\\n</parameter>' }}
{%- endfor %}
{%- endif %}
{{- others(tool.parameters, ['type', 'properties']) }}{{- '\\n</parameters>\\n</function>' }}
{%- endfor %}
{{- '\\n</tools>\\nCall as <tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>' }}
{{- '\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls is defined and m.tool_calls is iterable and m.tool_calls | length > 0 %}
{{- '<|im_start|>' + m.role }}
{%- if m.content is defined and m.content is string and m.content | trim | length > 0 %}
{{- '\\n' + m.content | trim + '\\n' }}
{%- endif %}
{%- for c in m.tool_calls %}
{%- if c.function is defined %}{%- set c = c.function %}{%- endif %}
{{- '\\n<tool_call>\\n<function=' + c.name + '>\\n' }}
{%- if c.arguments is defined %}
{%- for name, value in c.arguments | items %}
{{- '<parameter=' + name + '>\\n' }}
{%- if value is mapping or (value is sequence and value is not string) %}{%- set value = value | tojson | safe %}
{%- else %}{%- set value = value | string %}{%- endif %}
{{- value }}{{- '\\n</parameter>\\n' }}
{%- endfor %}
{%- endif %}
{{- '</function>\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user\\n' }}{%- endif %}
{{- '<tool_response>\\n' }}{{- m.content }}{{- '\\n</tool_response>\\n' }}
{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

# Markers made of roles, parts joined by a filter, messages prepared with a set block, no tools.
ROLES = """
{%- if messages[0].role == 'tool' %}{{ raise_exception('a chat does not begin with a tool') }}{% endif %}
{%- set marks = {'user': '<|user|>', 'assistant': '<|assistant|>'} %}
{%- for m in messages %}
{%- set turn %}<|{{ m.role }}|>{{ m.content | replace('\\r\\n', '\\n') }}{% endset %}
{{- [turn, '<|im_end|>'] | join(' ') }}
{%- endfor %}
{%- if add_generation_prompt %}{{ marks['assistant'] }}{% endif %}
"""

TEMPLATES = {
    "R1": R1,
    "R1-0528": R1_0528,
    "V3.1": V3_1,
    "Kimi": KIMI,
    "GLM": GLM,
    "Qwen3-Coder": QWEN3_CODER,
    "Hermes": HERMES,
    "roles": ROLES,
}
ARGUMENTS = {
    "R1": "text",
    "R1-0528": "text",
    "V3.1": "text",
    "Kimi": "any",
    "GLM": "object",
    "Qwen3-Coder": "object",
    "Hermes": "object",
    "roles": "any",
}


def write_chat_tokenizer(directory: Path, template: str, **config: Any) -> Path:
    """A checkpoint's tokenizer files with that template, whose added tokens are the markers of all families."""
    write_tokenizer(directory, chat_template=template, **config)
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.add_tokens([AddedToken(marker, normalized=False) for marker in MARKERS])
    backend.save(str(directory / "tokenizer.json"))
    return directory
