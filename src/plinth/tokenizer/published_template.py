"""Conversations rendered by a chat template that another project published with its tokenizer, and their loss mask.

The template runs in Jinja's sandbox with the functions that Hugging Face's templates are written for. What a message, a tool or a call
says is never a special token: it is guarded while the template runs. Only the template's own text makes special tokens.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plinth.config import UserError
from plinth.tokenizer.encode import Tokenizer

PRIVATE = range(0xE000, 0xF900)  # code points that no text should have; those of the marks are in none of the texts rendered
Span = tuple[int, int]


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant wrote; it stands between two marks that the template is given."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.Name("generation_marks", "load")])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    @staticmethod
    def _marked(marks: tuple[str, str], caller: Callable[[], str]) -> str:
        return marks[0] + caller() + marks[1]


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"], undefined=jinja2.Undefined
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the tokenizer's chat template is malformed: {error}. Copy the model again.") from None


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON as it is, where Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise jinja2.TemplateError(reason)


def render_published(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: list[dict[str, Any]] | None, *, masked: bool
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and of each whether it is an answer's, or of the end of one.

    Without `masked` the second list is all False. Raises UserError when the template refuses the conversation, with its words, and when
    it is not clear which text is an answer's.
    """
    template = tokenizer.chat_template(with_tools=bool(tools))
    assert template is not None
    marks = _marks(template, messages, tools)
    form = _Form(tokenizer, _compiled(template), marks)
    text, spans = form.render(messages, add_generation_prompt, tools)
    if masked and not spans:
        spans = form.answers(messages, tools, text)
    return tokenize_rendered(tokenizer, text, marks[0], spans if masked else [])


def _marks(template: str, *values: Any) -> tuple[str, str, str]:
    """Return a guard, and a mark for the beginning and the end of an answer: characters that stand nowhere else."""
    used = set(template + json.dumps(values, ensure_ascii=False, default=str))
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    return next(free), next(free), next(free)


class _Form:
    """One compiled template with its marks, and the names of its tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template, marks: tuple[str, str, str]):
        self.template, self.special, self.names = template, tokenizer.special_pattern, tokenizer.named_tokens
        self.guard, self.begin, self.end = marks

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any) -> tuple[str, list[Span]]:
        """Return the text, guarded, and the spans between marks, which are taken out of it."""
        try:
            text = self.template.render(
                messages=[self._guarded(message) for message in messages],
                tools=self._guarded(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                generation_marks=(self.begin, self.end),
                **self.names,
            )
        except jinja2.TemplateError as error:
            reason = str(error).rstrip(".")
            raise UserError(f"the model's chat template refuses this conversation: {reason}.{_way_out(reason, messages)}") from None
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"the model's chat template fails on this conversation: {error}.") from None
        return self._unmarked(text)

    def _guarded(self, value: Any) -> Any:
        """Return a value with a guard in every special token that its texts spell."""
        if isinstance(value, str):
            return self.special.sub(lambda match: match[0][0] + self.guard + match[0][1:], value) if self.special else value
        if isinstance(value, dict):
            return {key: self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list) else value

    def _unmarked(self, text: str) -> tuple[str, list[Span]]:
        spans, parts, length, start = [], [], 0, None
        for piece in re.split(f"([{self.begin}{self.end}])", text):
            if piece == self.begin:
                start = length
            elif piece == self.end:
                spans += [] if start is None else [(start, length)]
                start = None
            else:
                parts.append(piece)
                length += len(piece)
        return "".join(parts), spans

    def answers(self, messages: list[dict[str, Any]], tools: Any, text: str) -> list[Span]:
        """Return the spans of the answers in a text: what the assistant's messages say, with the special token that ends each.

        First by marks around each answer, where they leave the text as it is; else by what rendering one message more adds.
        """
        said = [message for message in messages if message["role"] == "assistant" and not message.get("tool_calls")]
        for strip in (False, True):  # templates often strip what a message says, which marks would hinder
            marked = [
                {**m, "content": self.begin + ((m["content"] or "").strip() if strip else m["content"] or "") + self.end}
                if m in said
                else m
                for m in messages
            ]
            found, spans = self.render(marked, False, tools)
            if found == text and len(spans) == sum(message["role"] == "assistant" for message in messages):
                return [(start, self._with_end(text, end)) for start, end in spans]
        return [self._added(messages, i, tools, text) for i, message in enumerate(messages) if message["role"] == "assistant"]

    def _with_end(self, text: str, end: int) -> int:
        """Return where the special token behind an answer, and blanks before it, end."""
        after = len(text) - len(text[end:].lstrip())
        match = self.special.match(text, after) if self.special else None
        return match.end() if match else end

    def _added(self, messages: list[dict[str, Any]], i: int, tools: Any, text: str) -> Span:
        """Return the span of message i: what the text up to it has more than the prompt for it."""
        before, _ = self.render(messages[:i], True, tools)
        after, _ = self.render(messages[: i + 1], False, tools)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"the model's chat template writes messages[{i}] in another way when more turns follow, so it is not clear what to learn. "
                "End the conversation with that answer, or leave its reasoning out."
            )
        blanks = len(after) - len(after.rstrip())
        return len(before), len(after) - blanks


def _way_out(reason: str, messages: list[dict[str, Any]]) -> str:
    if "system" in reason.lower() and messages[0]["role"] == "system":
        return " Put the system's text into the first message of the user."
    return ""


def tokenize_rendered(tokenizer: Tokenizer, text: str, guard: str, spans: list[Span]) -> tuple[list[int], list[bool]]:
    """Return the tokens of a rendered text, and of each whether it lies in one of the spans.

    Special tokens are those spelled without a guard; the text between them is encoded as text, and the guards taken out of it.
    """
    pieces, position = [], 0
    for match in tokenizer.special_pattern.finditer(text) if tokenizer.special_pattern else []:
        pieces += [(text[position : match.start()], position, None), (match[0], match.start(), tokenizer.token_id(match[0].strip()))]
        position = match.end()
    pieces.append((text[position:], position, None))
    plain = [piece.replace(guard, "") for piece, _, special in pieces if special is None]
    encoded = iter(tokenizer.encode_parts(plain))
    tokens, mask = [], []
    for piece, start, special in pieces:
        parts = [(special, 0, len(piece))] if special is not None else next(encoded)
        places = [i for i, character in enumerate(piece) if character != guard] + [len(piece)]
        for token, first, last in parts:
            begin, end = (start + places[min(at, len(places) - 1)] if special is None else start + at for at in (first, last))
            tokens.append(token)
            mask.append(any(begin < stop and end > at for at, stop in spans))
    return tokens, mask
