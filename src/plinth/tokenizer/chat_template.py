"""The renderer's text in the language of Hugging Face's chat templates, for their tools and for servers of other projects.

They turn special tokens in a message's text into special tokens; plinth.tokenizer.chat does not.
"""

from __future__ import annotations

from plinth.tokenizer.tool_format import CALL_END, CALL_START, RESPONSE_END, RESPONSE_START, TOOLS_INSTRUCTION, TOOLS_INTRODUCTION


def _quoted(text: str) -> str:
    """Return a text as a literal of the template's language."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


CHAT_TEMPLATE = (
    "{%- set space = namespace(rest=messages, results=false) -%}"
    "{%- if tools -%}"
    "{{ '<|system|>' }}"
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{{ messages[0]['content'] + '\\n\\n' }}{%- set space.rest = messages[1:] -%}"
    "{%- endif -%}"
    "{{ " + _quoted(TOOLS_INTRODUCTION + "\n") + " }}"
    "{%- for tool in tools -%}{{ (tool | tojson) + '\\n' }}{%- endfor -%}"
    "{{ " + _quoted(TOOLS_INSTRUCTION) + " + '<|end|>' }}"
    "{%- endif -%}"
    "{%- for message in space.rest -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{ raise_exception('role ' + message['role'] + ' is not one of system, user, assistant, tool') }}"
    "{%- endif -%}"
    "{%- if message['role'] == 'tool' -%}"  # the results of one answer's calls share a turn
    "{{ '\\n' if space.results else '<|user|>' }}"
    "{{ " + _quoted(RESPONSE_START) + " + message['content'] + " + _quoted(RESPONSE_END) + " }}"
    "{%- set space.results = true -%}"
    "{%- else -%}"
    "{%- if space.results -%}{{ '<|end|>' }}{%- set space.results = false -%}{%- endif -%}"
    "{%- set content = message['content'] if message['content'] else '' -%}"
    "{{ '<|' + message['role'] + '|>' + content }}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{ ('\\n' if content or not loop.first else '') + " + _quoted(CALL_START + "\n") + " }}"
    "{{ ({'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson) + " + _quoted("\n" + CALL_END) + " }}"
    "{%- endfor -%}"
    "{{ '<|end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if space.results -%}{{ '<|end|>' }}{%- endif -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
