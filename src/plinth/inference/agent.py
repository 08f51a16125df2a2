"""An agent: the model plans a call of a tool, the tool's result is shown to it, and so on until it answers.

The arguments of every call follow the tool's schema by construction. Steps, tokens and the context are bounded; what happened is
kept step by step, and what was read is said with its source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plinth.config import UserError
from plinth.inference.calculator import CONSTANTS, FUNCTIONS, calculate
from plinth.inference.retrieval import Found, SearchIndex
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextEngine
from plinth.inference.tool_calls import ToolCall, parse_answer, tool_grammar, why_call_invalid
from plinth.tokenizer.tool_format import CALL_START, Tool

LEAST_ROOM = 32  # tokens of the context that a turn must have for what the model writes
LEAST_SHOWN = 16  # characters of a result below which it is not shortened
SYSTEM = "Answer the question. Use a tool where it helps, and name what you read as [1], [2]."


@dataclass(frozen=True)
class Observation:
    """What a tool gave back."""

    text: str
    """what the model is shown"""
    sources: tuple[Found, ...] = ()
    """documents that it shows parts of"""


@dataclass(frozen=True)
class AgentTool:
    """Something that the model may call."""

    name: str
    """as it stands in a call"""
    description: str
    """what the model is told of it; short, for it takes from the context"""
    parameters: dict[str, Any]
    """JSON Schema of its arguments: an object whose properties have types"""
    use: Callable[[dict[str, Any]], Observation]
    """gives the result of a call; a UserError becomes the observation"""

    @property
    def signature(self) -> Tool:
        """The tool as the grammar has it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @property
    def shown(self) -> Tool:
        """The tool as the model is shown it: names and types of the arguments; further rules are the grammar's, which spares context."""
        properties = {name: {"type": rule["type"]} for name, rule in self.parameters["properties"].items()}
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": parameters}}


@dataclass(frozen=True)
class AgentLimits:
    """What one question may cost."""

    max_steps: int = 4
    """calls at most; then the model must answer without tools"""
    max_tokens: int = 512
    """tokens that the model writes at most, all turns together"""
    max_turn_tokens: int = 128
    """tokens of one turn at most"""

    def __post_init__(self) -> None:
        if self.max_steps < 0:
            raise UserError(f"max_steps={self.max_steps} must not be negative.")
        if self.max_turn_tokens < 1 or self.max_tokens < self.max_turn_tokens:
            raise UserError(
                f"max_turn_tokens={self.max_turn_tokens} must be at least 1 and at most max_tokens={self.max_tokens}. "
                "Lower it, or raise max_tokens."
            )


@dataclass(frozen=True)
class AgentStep:
    """One turn of the model and what came of it."""

    text: str
    """what it wrote beside its call; in the last step the answer"""
    call: str | None
    """tool that it called"""
    arguments: dict[str, Any] | None
    """what it called it with"""
    observation: str | None
    """what it was shown then; it begins with 'error:' where the call gave nothing"""
    num_tokens: int
    """tokens that it wrote"""


@dataclass(frozen=True)
class Source:
    """A document of which the model read a part."""

    number: int
    """[number] in the observations"""
    id: str
    """the document's id"""
    source: str
    """where it was read"""
    licence: str | None
    """its licence, where known"""
    url: str | None
    """its address, where known"""
    cited: bool
    """whether the answer names [number]; that it does so rightly is not checked"""


@dataclass(frozen=True)
class AgentResult:
    """What the agent found."""

    question: str
    """as it was asked"""
    answer: str
    """the model's last turn"""
    ended: str
    """'answer' (the model chose to), 'max_steps', 'max_tokens', 'context' or 'unfinished call': why no further call was allowed"""
    steps: list[AgentStep]
    """the transcript"""
    sources: list[Source]
    """what was read, in the order of the numbers"""
    num_tokens: int
    """tokens that the model wrote"""


def calculator_tool() -> AgentTool:
    """Return the tool that computes."""
    names = "|".join([*FUNCTIONS, *CONSTANTS])
    pattern = rf"^([0-9+*/%(). ,\-]|{names})+$"  # what arithmetic is written with; whether it is well-formed, the calculator says
    expression = {"type": "string", "pattern": pattern, "minLength": 1, "maxLength": 64}
    return AgentTool("calculator", "Compute an expression.", _object({"expression": expression}), _calculated)


def _calculated(arguments: dict[str, Any]) -> Observation:
    return Observation(calculate(arguments["expression"]))


def search_tool(index: SearchIndex, top: int = 2) -> AgentTool:
    """Return the tool that searches a corpus; `top` documents are shown each time."""

    def look(arguments: dict[str, Any]) -> Observation:
        found = index.search(arguments["query"], top)
        return Observation("" if found else "nothing found", tuple(found))

    query = {"type": "string", "minLength": 1, "maxLength": 64}
    return AgentTool("search", "Find passages of the documents.", _object({"query": query}), look)


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


@dataclass
class _Talk:
    """A question as it is worked on."""

    engine: TextEngine
    tools: Sequence[AgentTool]
    limits: AgentLimits
    params: SamplingParams
    messages: list[dict[str, Any]]
    steps: list[AgentStep] = field(default_factory=list)
    sources: list[Found] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(step.num_tokens for step in self.steps)

    @property
    def signatures(self) -> list[Tool]:
        return [tool.signature for tool in self.tools]

    @property
    def shown(self) -> list[Tool]:
        return [tool.shown for tool in self.tools]

    def room(self, messages: list[dict[str, Any]], tools: list[Tool] | None) -> int:
        """Return how many tokens of the context are left behind a prompt."""
        return self.engine.engine.max_seq_len - len(self.engine.render(messages, tools))

    def turn_tokens(self) -> int:
        return min(self.limits.max_turn_tokens, self.limits.max_tokens - self.num_tokens)

    def write(self, choice: str | None):
        """Let the model write one turn: with tools under the grammar of `choice`, or without."""
        tools = None if choice is None else self.shown
        grammar = None if choice is None else tool_grammar(self.signatures, choice, parallel=False)
        seed = None if self.params.seed is None else self.params.seed + len(self.steps)
        params = replace(self.params, max_tokens=self.turn_tokens(), seed=seed)
        return self.engine.chat([self.messages], params, grammar, tools)[0]

    def observe(self, call: ToolCall) -> Observation:
        """Use the tool and return what it gave; what went wrong is what the model is told."""
        reason = why_call_invalid(call, self.signatures)
        if reason is not None:
            return Observation(f"error: {reason}")
        tool = next(tool for tool in self.tools if tool.name == call.name)
        try:
            return tool.use(json.loads(call.arguments))
        except UserError as error:
            return Observation(f"error: {error}")

    def remember(self, text: str, call: ToolCall, observation: Observation) -> str:
        """Append a call and as much of its result as leaves room for an answer; return what is shown of it.

        The last documents are left out first, then the end of the text is; what is not shown gets no number.
        """
        said: dict[str, Any] = {"role": "assistant", "content": text, "tool_calls": [call.message()]}
        sources = list(observation.sources)
        shown = self._shown(observation.text, sources)
        while True:
            added = [said, {"role": "tool", "tool_call_id": call.id, "content": shown}]
            if len(shown) < LEAST_SHOWN or self.room([*self.messages, *added], None) >= 2 * LEAST_ROOM:
                break
            if len(sources) > 1:
                shown = self._shown(observation.text, sources[:-1])
                sources.pop()
            else:
                shown = shown[: len(shown) * 3 // 4].rstrip(" …") + " …"
        self.messages += added
        self.sources += [source for source in sources if source.id not in [known.id for known in self.sources]]
        return shown

    def _shown(self, text: str, sources: list[Found]) -> str:
        ids = list(dict.fromkeys(source.id for source in [*self.sources, *sources]))
        lines = (f"[{ids.index(found.id) + 1}] {found.source}: {found.excerpt}" for found in sources)
        return "\n".join([*filter(None, [text]), *lines])


def run_agent(
    engine: TextEngine,
    question: str,
    tools: Sequence[AgentTool],
    limits: AgentLimits | None = None,
    params: SamplingParams | None = None,
    *,
    system: str | None = SYSTEM,
    choice: str = "auto",
    on_step: Callable[[AgentStep], None] | None = None,
) -> AgentResult:
    """Answer a question with tools.

    params: how each turn is drawn (turn i with seed + i); greedy by default; its max_tokens is not used. choice: 'auto' lets the
    model answer when it likes; 'required' makes every turn before the last a call; a tool's name, a call of that one. on_step: is
    told each step when it is made. Raises UserError where the question and the tools' descriptions do not fit the context.
    """
    first = [{"role": "system", "content": system}] if system else []
    params = params or SamplingParams(temperature=0.0)
    talk = _Talk(engine, tools, limits or AgentLimits(), params, [*first, {"role": "user", "content": question}])
    if tools and (room := talk.room(talk.messages, talk.shown)) < LEAST_ROOM:
        limit = engine.engine.max_seq_len
        raise UserError(f"the question with {len(tools)} tools has {limit - room} tokens; the context holds {limit}. Give fewer tools.")
    ended = _use_tools(talk, choice, on_step or (lambda step: None))
    if ended != "answer":
        _answer(talk, on_step or (lambda step: None))
    answer = talk.steps[-1].text if talk.steps and talk.steps[-1].call is None else ""
    return AgentResult(question, answer, ended, talk.steps, _cited(talk.sources, answer), talk.num_tokens)


def _use_tools(talk: _Talk, choice: str, on_step: Callable[[AgentStep], None]) -> str:
    """Let the model call tools until it answers or may no more; return why it ended."""
    for _ in range(talk.limits.max_steps if talk.tools else 0):
        if talk.num_tokens + talk.limits.max_turn_tokens >= talk.limits.max_tokens and talk.steps:
            return "max_tokens"  # what is left is for the answer
        if talk.room(talk.messages, talk.shown) < LEAST_ROOM:
            return "context"
        completion = talk.write(choice)
        text, calls = parse_answer(completion.text, [tool.name for tool in talk.tools])
        if not calls:
            is_cut = choice != "auto" or CALL_START in text
            talk.steps.append(AgentStep(text, None, None, "error: the call was cut off" if is_cut else None, len(completion.tokens)))
            on_step(talk.steps[-1])
            return "unfinished call" if is_cut else "answer"
        observation = talk.remember(text, calls[0], talk.observe(calls[0]))
        arguments = json.loads(calls[0].arguments)
        talk.steps.append(AgentStep(text, calls[0].name, arguments, observation, len(completion.tokens)))
        on_step(talk.steps[-1])
    return "max_steps"


def _answer(talk: _Talk, on_step: Callable[[AgentStep], None]) -> None:
    """Let the model answer without tools, where the context and the tokens leave room."""
    if talk.turn_tokens() >= 1 and talk.room(talk.messages, None) >= 1:
        completion = talk.write(None)
        talk.steps.append(AgentStep(completion.text, None, None, None, len(completion.tokens)))
        on_step(talk.steps[-1])


def _cited(sources: list[Found], answer: str) -> list[Source]:
    numbered = enumerate(sources, 1)
    return [Source(i, found.id, found.source, found.licence, found.url, f"[{i}]" in answer) for i, found in numbered]
