"""Conversations rendered by a chat template that another project published with its tokenizer, and their loss mask.

The template runs in Jinja's sandbox with the functions that Hugging Face's templates are written for. What a message, a tool or a call
says is never a special token: it is guarded while the template runs. Only the template's own text makes special tokens.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plinth.config import UserError
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.tool_format import THINK, with_reasoning

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


class RewrittenAnswer(UserError):
    """An answer stands otherwise among later turns than where it ends the conversation: what to learn depends on which is meant."""


def render_published(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None,
    *,
    learnt: Sequence[int] = (),
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a conversation, and of each whether it is what the messages `learnt`, or their ends, are made of.

    Raises UserError when the template refuses the conversation, with its words, and RewrittenAnswer when it writes one of the learnt
    messages in another way than where that is the last.
    """
    form = _form(tokenizer, messages, tools)
    text, _ = form.render(messages, add_generation_prompt, tools)
    text, spans = form.answers(messages, learnt, tools, text) if learnt else (text, [])
    return tokenize_rendered(tokenizer, text, form.guard, spans)


def check_answers_stay(
    tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, learnt: Sequence[int]
) -> None:
    """Raise what `render_published` would raise for these learnt messages, without making tokens."""
    form = _form(tokenizer, messages, tools)
    form.answers(messages, learnt, tools, form.render(messages, False, tools)[0])


def _form(tokenizer: Tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> _Form:
    template = tokenizer.chat_template(with_tools=bool(tools))
    assert template is not None
    return _Form(tokenizer, _compiled(template), _marks(template, messages, tools))


def _marks(template: str, *values: Any) -> tuple[str, str, str]:
    """Return a guard, and a mark for the beginning and the end of an answer: characters that stand nowhere else."""
    used = set(template + json.dumps(values, ensure_ascii=False, default=str))
    free = (chr(code) for code in PRIVATE if chr(code) not in used)
    return next(free), next(free), next(free)


class _Form:
    """One compiled template with its marks, and the names of its tokenizer's special tokens."""

    def __init__(self, tokenizer: Tokenizer, template: jinja2.Template, marks: tuple[str, str, str]):
        self.tokenizer, self.template = tokenizer, template
        self.special, self.names = tokenizer.special_pattern, tokenizer.named_tokens
        self.guard, self.begin, self.end = marks

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any) -> tuple[str, list[Span]]:
        """Return the text, guarded, and the spans between marks, which are taken out of it."""
        try:
            try:
                text = self._written(messages, add_generation_prompt, tools)
            except TypeError:  # of templates that add a call's arguments to a text
                text = self._written(_with_text_arguments(messages), add_generation_prompt, tools)
        except jinja2.TemplateError as error:
            reason = str(error).rstrip(".")
            raise UserError(f"the model's chat template refuses this conversation: {reason}.{_way_out(reason, messages)}") from None
        except (TypeError, KeyError, AttributeError, ValueError, OverflowError) as error:
            raise UserError(f"the model's chat template fails on this conversation: {error}.") from None
        return self._unmarked(text)

    def _written(self, messages: list[dict[str, Any]], add_generation_prompt: bool, tools: Any) -> str:
        return self.template.render(
            messages=[self._guarded(message) for message in messages],
            tools=self._guarded(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            generation_marks=(self.begin, self.end),
            **self.names,
        )

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

    def answers(self, messages: list[dict[str, Any]], learnt: Sequence[int], tools: Any, text: str) -> tuple[str, list[Span]]:
        """Return the text to learn from, and the spans of the answers in it: all that follows an answer's prompt, to its end.

        The text is that of the conversation, but for the end of the last message, where that is learnt: see `_alone`.
        """
        spans: list[Span] = []
        for i in sorted(learnt, reverse=True):
            alone, found = self._alone(messages[: i + 1], tools)
            if i + 1 == len(messages):
                text = alone
            elif not text.startswith(alone[: found[-1][1]]):
                raise RewrittenAnswer(
                    f"the model's chat template writes messages[{i}] in another way when more turns follow, so it is not clear what to "
                    "learn. End the conversation with that answer, or give the earlier answers weight 0."
                )
            spans = found + spans
        return text, spans

    def _alone(self, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[Span]]:
        """Return the text of a conversation that ends with an answer, and the answer's spans.

        What the model is given, the prompt, is not learnt; all that it has to say then is, to the token that ends it. Where the template
        writes no such token, one is added; where it leaves out a part of what is said, the answer follows its prompt as it was said.
        Reasoning in a field that the template does not read is put before the answer's text.
        """
        text, tagged = self.render(messages, False, tools)
        prompt, before = (self.render(messages[:-1], given, tools)[0] if len(messages) > 1 else "" for given in (True, False))
        shared = len(prompt) if text.startswith(prompt) else len(os.path.commonprefix([prompt, text]))
        if shared < len(before.rstrip()):
            raise UserError(
                f"the model's chat template writes what stands before messages[{len(messages) - 1}] in another way with that answer than "
                "when it asks for it, so it would be learnt behind other words than it is asked for with. Put the system's text into the "
                "first message of the user, if there is one; else leave that row out."
            )
        thought = messages[-1].get("reasoning_content")
        if thought and not _holds(text[shared:], self._guarded(thought)):
            content = with_reasoning(messages[-1].get("content") or "", thought)
            return self._alone([*messages[:-1], {**messages[-1], "content": content, "reasoning_content": None}], tools)
        if tagged:
            spans = [(max(first, shared), self._trimmed(text, last)) for first, last in tagged if last > shared]
            return text, spans or [(shared, shared)]
        self._check_calls(messages, text[shared:])
        if self._misses(messages[-1], text[len(before.rstrip()) :], prompt):
            text, start = self._said(messages, tools, prompt)
            end = len(text)
        else:
            answer = self._marked(messages, tools, text)
            start = _start(text, prompt, shared, answer)
            end = len(text.rstrip()) if answer is None else self._with_end(text, answer[1])
        return (text, [(start, end)]) if self._ends(text[start:end]) else self._ended(messages, tools, text[:end], start)

    def _check_calls(self, messages: list[dict[str, Any]], written: str) -> None:
        names = [call["function"]["name"] for call in messages[-1].get("tool_calls") or []]
        if any(self._guarded(name) not in written for name in names):
            raise UserError(
                f"the model's chat template leaves out the calls of messages[{len(messages) - 1}] ({', '.join(names)}), so they cannot be "
                "learnt. Leave that row out, or take a model whose template knows tools."
            )

    def _marked(self, messages: list[dict[str, Any]], tools: Any, text: str) -> Span | None:
        """Return where the last message's words stand in the text, found by marks around them; None where marks change the text."""
        message = messages[-1]
        if message.get("tool_calls"):
            return None
        said = message["content"] or ""
        for words in (said, said.strip()):  # templates often strip what a message says, which marks would hinder
            found, spans = self.render([*messages[:-1], {**message, "content": self.begin + words + self.end}], False, tools)
            if found == text and len(spans) == 1:
                return spans[0]
        return None

    def _with_end(self, text: str, end: int) -> int:
        """Return where the special token behind an answer ends, or of several the first that ends generation; blanks may stand between.

        Where there is no such token it is the end of the text.
        """
        found: list[re.Match[str]] = []
        at = end
        while self.special and (match := self.special.match(text, len(text) - len(text[at:].lstrip()))):
            found.append(match)
            at = match.end()
        if not found:
            return max(end, len(text.rstrip()))
        return next((match for match in found if self._is_end(match[0])), found[0]).end()

    def _is_end(self, spelled: str) -> bool:
        return self.tokenizer.token_id(spelled.strip()) in self.tokenizer.end_ids

    def _misses(self, message: dict[str, Any], written: str, prompt: str) -> bool:
        """Return whether a template's turn lacks some of what was said, or begins reasoning anew that the prompt has begun."""
        said = self._guarded(message.get("content") or "")
        if message.get("tool_calls"):
            return False
        again = prompt.rstrip().endswith(THINK) and said.lstrip().startswith(THINK) and written.count(THINK) > said.count(THINK)
        return again or not _holds(written, said)

    def _trimmed(self, text: str, end: int) -> int:
        """Return where a text up to `end` ends without the blanks behind a token that ends an answer: the model is stopped before them."""
        return len(text[:end].rstrip()) if self._ends(text[:end]) else end

    def _said(self, messages: list[dict[str, Any]], tools: Any, prompt: str) -> tuple[str, int]:
        """Return a prompt with the answer as it was said, whole, and where that begins; its end is that of another answer."""
        plain = [*messages[:-1], {**messages[-1], "content": "x"}]
        text, _ = self.render(plain, False, tools)
        answer = self._marked(plain, tools, text)
        if answer is None:
            raise UserError(
                f"the model's chat template leaves out a part of what messages[{len(messages) - 1}] says, such as reasoning before "
                "</think>, so it cannot be learnt. Leave that part out of the row, or change the template."
            )
        said = self._guarded(messages[-1]["content"]).strip()
        if prompt.rstrip().endswith(THINK):  # the prompt has begun the reasoning
            said = said.removeprefix(THINK).lstrip("\n")
        return prompt + said + text[answer[1] : self._with_end(text, answer[1])], len(prompt)

    def _ends(self, written: str) -> bool:
        """Return whether a text ends with a token that ends an answer."""
        names = [*([self.names["eos_token"]] if "eos_token" in self.names else []), *self.tokenizer.special_names]
        return written.rstrip().endswith(tuple(names))

    def _ended(self, messages: list[dict[str, Any]], tools: Any, text: str, start: int) -> tuple[str, list[Span]]:
        """Return a text with a token that ends its answer: the one that a next turn begins with where it ends answers, else eos_token."""
        calls = messages[-1].get("tool_calls")
        answer = messages[-1] if calls else {"role": "assistant", "content": f"{self.begin}x{self.end}"}
        try:
            more, spans = self.render([*messages[:-1], answer, {"role": "tool" if calls else "user", "content": "x"}], False, tools)
        except UserError:
            more, spans = "", []
        at = len(text) if calls and more.startswith(text) else spans[0][1] if spans else len(more)
        match = self.special.match(more, at) if self.special else None
        end = match[0] if match and self._is_end(match[0]) else self.names.get("eos_token", "")
        text += end if self._is_end(end) else ""
        return text, [(start, len(text))]


def _with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages with the arguments of calls as JSON text."""

    def told(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": _tojson(function["arguments"])}}

    return [{**m, "tool_calls": [told(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


def _start(text: str, prompt: str, shared: int, answer: Span | None) -> int:
    """Return where what the model says begins: behind what the text shares with the prompt, its answer found in the text or not.

    What an answer has in common with the end of a prompt by chance is the answer's, but for the mark of reasoning.
    """
    if answer is None or shared == len(prompt) > 0 or (shared and text.startswith(THINK, answer[0])):
        return shared
    return min(shared, answer[0]) if prompt else answer[0]


def _holds(text: str, part: str) -> bool:
    """Return whether a text has a part, blanks aside."""
    return "".join(part.split()) in "".join(text.split())


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
        tokens += [token for token, _, _ in parts]
        within = [(at - start, stop - start) for at, stop in spans if at < start + len(piece) and stop > start]
        if within and special is None and guard in piece:  # places among the characters that are no guards, as places in the piece
            places = [i for i, character in enumerate(piece) if character != guard] + [len(piece)]
            parts = [(token, places[min(first, len(places) - 1)], places[min(last, len(places) - 1)]) for token, first, last in parts]
        mask += [any(first < stop and last > at for at, stop in within) for _, first, last in parts]
    return tokens, mask
