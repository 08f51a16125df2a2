"""Chat forms of the widely used model families, written anew as short templates with the quirks that each form has.

None is the text of a published template. What is alike is what tokens come where: first tokens, headers, what ends an answer, what is
trimmed, refused, put in by default, or left out of earlier answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers

from tokenizer.published_folders import begun, byte_level, with_bytes, write


@dataclass(frozen=True)
class Family:
    """One family's chat form."""

    template: str
    """its template"""
    said: str
    """what the model says after its prompt, with {} for the answer"""
    special: tuple[str, ...]
    """special tokens beside those that the kind of tokenizer has"""
    eos: str
    """the token that tokenizer_config.json names as the end"""
    bos: str | None = None
    """the first token, where there is one"""
    pieces: bool = False
    """converted from sentencepiece, which has <unk>, <s> and </s>; else byte-level"""
    added: tuple[str, ...] = ()
    """tokens that are added but not special"""
    ends: tuple[str, ...] = ()
    """further tokens that generation_config.json ends at"""
    strips: tuple[str, ...] = ()
    """special tokens that take along the blanks behind them"""
    system: bool = True
    """whether a system message may come first"""
    apart: bool = False
    """whether plain earlier answers are written otherwise than a last one"""
    opens: str = ""
    """what the prompt has at its end that a plain answer, without reasoning, does not follow"""
    thought: str | None = None
    """what is learnt of an answer with reasoning, with {} for reasoning and answer; None where the form knows no reasoning"""
    adds_end: bool = False
    """whether the template writes no end behind the last answer, so that one is added to what is learnt"""

    def write(self, folder: Path) -> Path:
        """Write a small tokenizer with this template into a folder."""
        if self.pieces:
            backend = with_bytes("first")
            backend.add_special_tokens(list(self.special))
        else:
            backend = byte_level([token for token in self.special if token not in self.strips], list(self.added))
            backend.add_special_tokens([tokenizers.AddedToken(token, special=True, rstrip=True) for token in self.strips])
        names = {"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        write(begun(backend, self.bos) if self.bos else backend, folder, **names, chat_template=self.template)
        ends = [backend.token_to_id(token) for token in (self.eos, *self.ends)]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return folder


@dataclass(frozen=True)
class ChatMl(Family):
    """<|im_start|>role, a line break, the text, <|im_end|>."""

    template: str = ""
    said: str = "{}<|im_end|>"
    special: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    eos: str = "<|im_end|>"
    head: str = field(default="", kw_only=True)
    """what the template writes before the messages"""

    def __post_init__(self) -> None:
        turns = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )
        object.__setattr__(self, "template", self.template or self.head + turns)


TAKE_SYSTEM = (  # the system's text in `told`, the other messages in `rest`
    "{% set told = messages[0].content if messages and messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if messages and messages[0].role == 'system' else messages %}"
)
ALTERNATE = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
LLAMA_2 = (  # every question behind <s>, the system's text inside the first
    TAKE_SYSTEM + "{% for m in rest %}" + ALTERNATE + "{% set said = m.content.strip() %}"
    "{% if loop.first and told %}{% set said = '<<SYS>>\\n' + told + '\\n<</SYS>>\\n\\n' + said %}{% endif %}"
    "{{ bos_token + '[INST] ' + said + ' [/INST]' if m.role == 'user' else ' ' + said + ' ' + eos_token }}{% endfor %}"
)
LLAMA_3 = (  # a system block with the date, asked for or not
    "{{ bos_token }}" + TAKE_SYSTEM + "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nKnows until: 2023\\nToday: ' }}"
    "{{ strftime_now('%d %b %Y') + '\\n\\n' + told | trim + '<|eot_id|>' }}"
    "{% for m in rest %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
LLAMA_4 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|header_start|>' + m.role + '<|header_end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"
)
MISTRAL_1 = (  # brackets that are plain text, no system
    "{{ bos_token }}{% for m in messages %}" + ALTERNATE + "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_3 = (  # brackets that are tokens; the system's text and the tools stand in the last question, if that is the last message
    "{{ bos_token }}" + TAKE_SYSTEM + "{% set asked = rest | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (told + '\\n\\n' if told and loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA_TURNS = (
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ (told + '\\n\\n' if told and loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
GEMMA_2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + GEMMA_TURNS
)
GEMMA_3 = "{{ bos_token }}" + TAKE_SYSTEM + "{% for m in rest %}" + ALTERNATE + GEMMA_TURNS
PHI_3 = (  # the end of all texts behind the last turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
THOUGHTS = (  # of an assistant's message: the reasoning in `thought`, the answer in `said`; in `asked` the place of the last question
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '' %}"
    "{% set thought = m.reasoning_content or thought %}"
)
QWEN_3 = (  # reasoning stays behind the last question only, and an empty one stands in the last answer
    THOUGHTS + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN_3_5 = QWEN_3.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")  # reasoning is begun by the prompt
NEMOTRON_3 = (  # reasoning is begun by the prompt; answers without it close it at once
    THOUGHTS + "{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + thought + '\\n</think>\\n' if thought and loop.index0 > ns.asked else '<think></think>' }}{{ said }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
GLM_4_5 = (  # reasoning stays behind the last question only; nothing ends an answer but the next header
    "{{ '[gMASK]<sop>' }}" + THOUGHTS + "{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}"
    "{{ '\\n<think>' + (thought if loop.index0 > ns.asked else '') + '</think>\\n' + said }}{% else %}{{ '\\n' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
COMMAND_A = (  # an answer stands between tokens of its own within its turn
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' }}"
    "{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' if m.role == 'assistant' else m.content }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|ASSISTANT_TOKEN|>' }}{% endif %}"
)
DEEPSEEK_3 = (
    "{{ bos_token }}" + TAKE_SYSTEM + "{{ told }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
DEEPSEEK_R1 = (  # reasoning is left out of every answer, and begun by the prompt
    "{{ bos_token }}" + TAKE_SYSTEM + "{{ told }}{% for m in rest %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
GPT_OSS = (  # channels; the system's text in the developer's turn; the last answer ends with another token; reasoning in a field
    "{{ '<|start|>system<|message|>Today: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: medium<|end|>' }}"
    + TAKE_SYSTEM
    + "{% if told %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + told + '<|end|>' }}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% set names = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'} %}{% for m in messages %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + names[m.role] + '_TOKEN|>' + m.content.strip() + '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
GRANITE = (  # a default system message with the date
    TAKE_SYSTEM + "{% set told = told or 'Today is ' + strftime_now('%B %d, %Y') + '. Be brief.' %}"
    "{{ '<|start_of_role|>system<|end_of_role|>' + told + '<|end_of_text|>\\n' }}"
    "{% for m in rest %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
OLMO_2 = (  # headers that are plain text; one token begins and ends; a break behind answers but the last
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not (loop.last and m.role == 'assistant') %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
SMOLLM_3 = (  # generation tags, around the header too; the mode of reasoning in the system's block
    TAKE_SYSTEM
    + "{{ '<|im_start|>system\\n## Metadata\\nToday: ' + strftime_now('%d %B %Y') + '\\nMode: /think\\n\\n' + told + '<|im_end|>\\n' }}"
    "{% for m in rest %}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<|im_start|>assistant\\n' + m.content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
VICUNA = (
    TAKE_SYSTEM + "{{ bos_token + (told or 'A chat of a curious user and an assistant.') }}"
    "{% for m in rest %}{{ ' USER: ' if m.role == 'user' else ' ASSISTANT: ' }}{{ m.content.strip() }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
FALCON_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not (loop.last and m.role == 'assistant') %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GLM_4 = (  # nothing ends an answer but the next header
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
KIMI_K2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_system|>system<|im_middle|>Be brief.<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|>' }}{% endif %}"
)
STARCODER_2 = (
    "{{ bos_token }}" + TAKE_SYSTEM + "{{ (told or 'You write code.') + '\\n\\n' }}{% for m in rest %}"
    "{{ '### Instruction\\n' if m.role == 'user' else '### Response\\n' }}{{ m.content + ('' if m.role == 'user' else eos_token) }}"
    "{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response\\n' }}{% endif %}"
)
NEMOTRON = (  # nothing ends an answer
    TAKE_SYSTEM + "{{ '<extra_id_0>System\\n' + told + '\\n\\n' }}{% for m in rest %}"
    "{{ '<extra_id_1>' + m.role | capitalize + '\\n' + m.content.strip() + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<extra_id_1>Assistant\\n' }}{% endif %}"
)
EXAONE = (
    "{% if messages[0].role != 'system' %}{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
    "{% for m in messages %}{{ '[|' + m.role + '|]' + m.content + ('\\n' if m.role == 'user' else '[|endofturn|]\\n') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
HEADS = ("<|system|>", "<|user|>", "<|assistant|>")
KIMI = ("<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>")
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"

FAMILIES: dict[str, Family] = {
    "Llama 2": Family(LLAMA_2, " {} </s>", (), "</s>", "<s>", pieces=True),
    "Llama 3": Family(
        LLAMA_3, "{}<|eot_id|>", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>",
        "<|begin_of_text|>",
    ),
    "Llama 4": Family(
        LLAMA_4, "{}<|eot|>", ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"), "<|eot|>", "<|begin_of_text|>"
    ),
    "Mistral v1 and Mixtral": Family(MISTRAL_1, " {}</s>", (), "</s>", "<s>", pieces=True, system=False),
    "Mistral v3": Family(
        MISTRAL_3, " {}</s>", ("[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"), "</s>", "<s>", pieces=True, system=False
    ),
    "Mistral v7": Family(
        MISTRAL_7, "{}</s>", ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", "<s>"
    ),
    "Gemma 2": Family(
        GEMMA_2, "{}<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "</s>", "<s>", pieces=True, ends=("<end_of_turn>",), system=False
    ),
    "Gemma 3": Family(
        GEMMA_3, "{}<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), "</s>", "<s>", pieces=True, ends=("<end_of_turn>",)
    ),
    "Phi-3": Family(
        PHI_3, "{}<|end|>", ("<|endoftext|>", *HEADS, "<|end|>"), "<|endoftext|>", ends=("<|end|>",), strips=(*HEADS, "<|end|>")
    ),
    "Phi-4": Family(PHI_4, "{}<|im_end|>", ("<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>"),
    "Qwen 2 and 2.5": ChatMl(head=DEFAULT_SYSTEM),
    "Qwen 3": ChatMl(
        QWEN_3, "<think>\n\n</think>\n\n{}<|im_end|>", added=("<think>", "</think>"), apart=True,
        thought="<think>\n{}\n</think>\n\n{}<|im_end|>",
    ),
    "Qwen 3.5": ChatMl(
        QWEN_3_5, "\n</think>\n\n{}<|im_end|>", added=("<think>", "</think>"), apart=True, thought="{}\n</think>\n\n{}<|im_end|>"
    ),
    "DeepSeek V3": Family(DEEPSEEK_3, "{}<｜end▁of▁sentence｜>", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0]),
    "DeepSeek R1": Family(
        DEEPSEEK_R1, "{}<｜end▁of▁sentence｜>", DEEPSEEK, DEEPSEEK[1], DEEPSEEK[0], added=("<think>", "</think>"),
        opens="<think>\n", thought="{}\n</think>\n\n{}<｜end▁of▁sentence｜>",
    ),
    "gpt-oss": Family(
        GPT_OSS, "<|channel|>final<|message|>{}<|return|>", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        "<|return|>", apart=True,
    ),
    "Command R": Family(
        COMMAND_R, "{}<|END_OF_TURN_TOKEN|>",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "Command A": Family(
        COMMAND_A, "<|START_RESPONSE|>{}<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|USER_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>",
    ),
    "Granite 3": Family(GRANITE, "{}<|end_of_text|>", ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>"),
    "OLMo 2": Family(OLMO_2, "{}<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "SmolLM 3": ChatMl(SMOLLM_3),
    "Zephyr": Family(ZEPHYR, "\n{}</s>", (), "</s>", "<s>", pieces=True),
    "Vicuna": Family(VICUNA, " {}</s>", (), "</s>", "<s>", pieces=True),
    "Falcon 3": Family(FALCON_3, "{}<|endoftext|>", ("<|endoftext|>", *HEADS), "<|endoftext|>"),
    "Yi": ChatMl(),
    "InternLM 2": ChatMl(
        special=("<s>", "</s>", "<|im_start|>", "<|im_end|>"), eos="</s>", bos="<s>", ends=("<|im_end|>",), head="{{ bos_token }}"
    ),
    "GLM-4": Family(
        GLM_4, "{}<|user|>", ("<|endoftext|>", "[gMASK]", "<sop>", *HEADS), "<|endoftext|>", ends=("<|user|>",), adds_end=True
    ),
    "GLM-4.5": Family(
        GLM_4_5, "\n<think></think>\n{}<|user|>", ("<|endoftext|>", "[gMASK]", "<sop>", *HEADS), "<|endoftext|>", ends=("<|user|>",),
        added=("<think>", "</think>"), adds_end=True, thought="\n<think>{}</think>\n{}<|user|>",
    ),
    "Kimi K2": Family(KIMI_K2, "{}<|im_end|>", KIMI, "<|im_end|>"),
    "StarCoder 2": Family(STARCODER_2, "{}<|endoftext|>", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    "Nemotron 3": ChatMl(
        NEMOTRON_3, "</think>{}<|im_end|>", added=("<think>", "</think>"), opens="\n", thought="{}\n</think>\n{}<|im_end|>"
    ),
    "Nemotron Mini": Family(NEMOTRON, "{}</s>", (), "</s>", pieces=True, apart=True, adds_end=True),
    "EXAONE": Family(EXAONE, "{}[|endofturn|]", ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"), "[|endofturn|]"),
}  # fmt: skip
