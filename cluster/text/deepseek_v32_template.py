"""DeepSeek-V3.2's encoding of messages, as a chat template: its checkpoints come with Python code for it, and none.

`thinking` chooses between its two modes. Tools are told at the end of the first system message, or of an empty one
where there is none. Thoughts before the last user message are left out, and in thinking mode a developer's messages
too. Source: encoding/encoding_dsv32.py of deepseek-ai/DeepSeek-V3.2."""

from __future__ import annotations

MODEL_TYPE = "deepseek_v32"  # of the checkpoints that this is for

_TOOLS = """
{%- macro told_tools() -%}
{{ '\\n\\n## Tools\\n\\nYou have access to a set of tools you can use to answer the user\\'s question.\\nYou can '
   'invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the '
   'user:\\n<｜DSML｜function_calls>\\n<｜DSML｜invoke name="$FUNCTION_NAME">\\n<｜DSML｜parameter '
   'name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>\\n...\\n</｜DSML｜invoke>\\n'
   '<｜DSML｜invoke name="$FUNCTION_NAME2">\\n...\\n</｜DSML｜invoke>\\n</｜DSML｜function_calls>\\n\\nString and '
   'scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use '
   'JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other '
   'types (numbers, booleans, arrays, objects).\\n\\nIf the thinking_mode is enabled, then after function results '
   'you should strongly consider outputting a thinking block. Here is an example:\\n\\n<｜DSML｜function_calls>\\n'
   '...\\n</｜DSML｜function_calls>\\n\\n<function_results>\\n...\\n</function_results>\\n\\n<think>...thinking '
   'about results</think>\\n\\nHere are the functions available in JSONSchema format:\\n<functions>\\n' }}
{%- for tool in tools -%}{{ '' if loop.first else '\\n' }}{{ tool.function | tojson }}{%- endfor -%}
{{ '\\n</functions>\\n' }}
{%- endmacro -%}
"""
_CALLS = """
{%- macro told_calls(calls) -%}
{{ '\\n\\n<｜DSML｜function_calls>\\n' }}
{%- for call in calls -%}
  {{ '' if loop.first else '\\n' }}{{ '<｜DSML｜invoke name="' + call.function.name + '">\\n' }}
  {%- for key, value in call.function.arguments.items() -%}
    {{ '' if loop.first else '\\n' }}{{ '<｜DSML｜parameter name="' + key + '" string="' }}
    {%- if value is string -%}{{ 'true">' + value }}{%- else -%}{{ 'false">' + value | tojson }}{%- endif -%}
    {{ '</｜DSML｜parameter>' }}
  {%- endfor -%}
  {{ '\\n</｜DSML｜invoke>' }}
{%- endfor -%}
{{ '\\n</｜DSML｜function_calls>' }}
{%- endmacro -%}
"""
_MESSAGES = """
{%- set thinks = thinking is defined and thinking -%}
{%- set ns = namespace(last=-1, system=false, calls=0, results=0) -%}
{%- for m in messages -%}
  {%- if m.role in ('user', 'developer') -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
  {%- if m.role == 'system' -%}{%- set ns.system = true -%}{%- endif -%}
{%- endfor -%}
{{ bos_token }}
{%- if tools and not ns.system -%}{{ told_tools() }}{%- endif -%}
{%- set ns.system = false -%}
{%- for m in messages -%}
  {%- set goes_on = not loop.last or add_generation_prompt -%}
  {%- set now = thinks and loop.index0 >= ns.last -%}
  {%- if m.role == 'system' -%}
    {{ m.content or '' }}
    {%- if tools and not ns.system -%}{{ told_tools() }}{%- endif -%}
    {%- set ns.system = true -%}
  {%- elif m.role == 'user' or (m.role == 'developer' and not (thinks and loop.index0 < ns.last)) -%}
    {{ '<｜User｜>' }}{{ '\\n\\n# The user\\'s message is: ' if m.role == 'developer' else '' }}{{ m.content }}
    {%- if goes_on -%}{{ '<｜Assistant｜>' + ('<think>' if now else '</think>') }}{%- endif -%}
  {%- elif m.role == 'assistant' -%}
    {%- set ns.calls = m.tool_calls | length if m.tool_calls else 0 -%}
    {%- set ns.results = 0 -%}
    {%- if now -%}{{ (m.reasoning_content or '') + '</think>' }}{%- endif -%}
    {{ m.content or '' }}
    {%- if ns.calls -%}{{ told_calls(m.tool_calls) }}{%- endif -%}
    {{ eos_token }}
  {%- elif m.role == 'tool' -%}
    {%- set ns.results = ns.results + 1 -%}
    {%- if ns.results > ns.calls -%}
      {{ raise_exception('a tool message must answer one of the calls of the assistant message before it') }}
    {%- endif -%}
    {{ '\\n\\n<function_results>' if ns.results == 1 else '' }}{{ '\\n<result>' }}{{ m.content }}{{ '</result>' }}
    {%- if ns.results == ns.calls -%}
      {{ '\\n</function_results>' }}
      {%- if goes_on -%}{{ '\\n\\n' + ('<think>' if now else '</think>') }}{%- endif -%}
    {%- endif -%}
  {%- elif m.role != 'developer' -%}
    {{ raise_exception('the role ' + m.role + ' is not known') }}
  {%- endif -%}
{%- endfor -%}
"""
TEMPLATE = _TOOLS + _CALLS + _MESSAGES
