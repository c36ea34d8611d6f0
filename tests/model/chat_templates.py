"""Chat templates in the manner of published families, as far as tools, reasoning and images go.

Each writes what its family's models learnt to read; `call` writes a tool call as such a model does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

CONTENT = (
    "{%- macro content(message) -%}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- elif message.content is not none -%}"
    "{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}<image>"
    "{%- elif part.type == 'video' -%}<|video|>"
    "{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

PLAIN = (
    CONTENT
    + """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + content(message) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

# As of Qwen2.5 and Hermes: calls are JSON in <tool_call> tags, results come in the user's turn.
_HERMES = """
{%- set system = content(messages[0]) if messages[0].role == 'system' else 'You are a helpful assistant.' -%}
{{- '<|im_start|>system\n' + system -}}
{%- if tools -%}
{{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' -}}
{{- '<tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\n' -}}REASONING{{- content(message) -}}
{%- for call in message.tool_calls or [] -%}
{%- if call.function -%}{%- set call = call.function -%}{%- endif -%}
{{- '\n<tool_call>\n{"name": "' + call.name + '", "arguments": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}{{- '}\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + content(message) + '\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
{%- elif message.role == 'user' or not loop.first -%}
{{- '<|im_start|>' + message.role + '\n' + content(message) + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}PROMPT{%- endif -%}
"""
_PAST_REASONING = (
    "{%- if message.reasoning_content -%}"
    "{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' -}}{%- endif -%}"
)
HERMES = CONTENT + _HERMES.replace("REASONING", "").replace("PROMPT", "")
# As of Qwen3: the model opens <think> itself, unless `enable_thinking` is false.
QWEN3 = CONTENT + _HERMES.replace("REASONING", _PAST_REASONING).replace(
    "PROMPT",
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}",
)
# As of Qwen3's thinking editions: the template opens <think>, so that answers begin with reasoning.
THINKING = CONTENT + _HERMES.replace("REASONING", _PAST_REASONING).replace("PROMPT", "{{- '<think>\n' -}}")

# As of Llama 3.1 and 3.2: a call is a JSON object alone, with "parameters", maybe after <|python_tag|>.
LLAMA3 = (
    CONTENT
    + """
{{- bos_token -}}
{%- set system = content(messages[0]) if messages[0].role == 'system' else '' -%}
{%- if tools or system -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' -}}
{%- if tools -%}{{- 'Environment: ipython\n' -}}{%- endif -%}
{{- 'Cutting Knowledge Date: December 2023\n\n' -}}
{%- if tools -%}
{{- 'You have access to the following functions. To call a function, please respond with JSON for a function call. ' -}}
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}. ' -}}
{{- 'Do not use variables.\n\n' -}}
{%- for tool in tools -%}{{- (tool | tojson(indent=4)) + '\n\n' -}}{%- endfor -%}
{%- endif -%}
{{- system + '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.tool_calls -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{%- if message.tool_calls | length != 1 -%}
{{- raise_exception('This model only supports single tool-calls at once!') -}}
{%- endif -%}
{%- set call = message.tool_calls[0].function -%}
{{- '{"name": "' + call.name + '", "parameters": ' -}}
{{- call.arguments if call.arguments is string else call.arguments | tojson -}}{{- '}<|eot_id|>' -}}
{%- elif message.role == 'tool' or message.role == 'ipython' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + ({'output': content(message)} | tojson) + '<|eot_id|>' -}}
{%- elif message.role != 'system' or not loop.first -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + content(message) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
)

# As of Llama 4 and Llama 3.2's small ones: a list of calls in Python's notation.
PYTHONIC = (
    CONTENT
    + """
{{- bos_token -}}
{%- set system = content(messages[0]) if messages[0].role == 'system' else '' -%}
{%- if tools or system -%}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system -}}
{%- if tools -%}
{{- '\nHere is a list of functions in JSON format that you can invoke. If you decide to invoke any of the ' -}}
{{- 'function(s), you MUST put it in the format of [func_name1(param1=value1, param2=value2), func_name2(...)]\n' -}}
{{- tools | tojson(indent=4) -}}
{%- endif -%}
{{- '<|eot_id|>' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' and message.tool_calls -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + content(message) + '[' -}}
{%- for call in message.tool_calls -%}
{{- call.function.name + '(' -}}
{%- for name, value in call.function.arguments.items() -%}
{{- name + '=' + (value | tojson) -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ')' -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']<|eot_id|>' -}}
{%- elif message.role == 'tool' or message.role == 'ipython' -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (content(message) | tojson) + '<|eot_id|>' -}}
{%- elif message.role != 'system' or not loop.first -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + content(message) + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
)

# As of Mistral's models since v3 of its tokenizer: a JSON list of calls after [TOOL_CALLS], ids of nine characters.
MISTRAL = (
    CONTENT
    + """
{{- bos_token -}}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- '[SYSTEM_PROMPT]' + content(message) + '[/SYSTEM_PROMPT]' -}}
{%- elif message.role == 'user' -%}
{%- if tools and message == users[-1] -%}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}
{%- endif -%}
{{- '[INST]' + content(message) + '[/INST]' -}}
{%- elif message.role == 'assistant' and message.tool_calls -%}
{{- content(message) + '[TOOL_CALLS][' -}}
{%- for call in message.tool_calls -%}
{%- if call.id | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}
{{- '{"name": "' + call.function.name + '", "arguments": ' -}}
{%- set arguments = call.function.arguments -%}
{{- arguments if arguments is string else arguments | tojson -}}
{{- ', "id": "' + call.id + '"}' -}}{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}
{%- endfor -%}
{{- ']' + eos_token -}}
{%- elif message.role == 'assistant' -%}
{{- content(message) + eos_token -}}
{%- elif message.role == 'tool' -%}
{%- if message.tool_call_id is not defined or message.tool_call_id | length != 9 -%}
{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') -}}
{%- endif -%}
{{- '[TOOL_RESULTS]{"content": ' + (content(message) | tojson) -}}
{{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' -}}
{%- endif -%}
{%- endfor -%}
"""
)

TEMPLATES = {
    "plain": PLAIN,
    "hermes": HERMES,
    "qwen3": QWEN3,
    "thinking": THINKING,
    "llama3": LLAMA3,
    "pythonic": PYTHONIC,
    "mistral": MISTRAL,
}
# The token that ends an answer.
ENDS = {"llama3": "<|eot_id|>", "pythonic": "<|eot_id|>", "mistral": "</s>"}
END = "<|im_end|>"  # of the others


def call(kind: str, name: str, arguments: Mapping[str, Any], *more: tuple[str, Mapping[str, Any]]) -> str:
    """Write tool calls as a model of this kind does."""
    calls = [(name, arguments), *more]
    if kind in ("hermes", "qwen3", "thinking"):
        return "\n".join(
            f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
            for name, arguments in calls
        )
    if kind == "llama3":
        return "; ".join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    if kind == "pythonic":
        written = (f"{name}({', '.join(f'{key}={value!r}' for key, value in each.items())})" for name, each in calls)
        return f"[{', '.join(written)}]"
    if kind == "mistral":
        return f"[TOOL_CALLS]{json.dumps([{'name': name, 'arguments': each} for name, each in calls])}"
    raise ValueError(f"models of kind {kind!r} call no tools")
