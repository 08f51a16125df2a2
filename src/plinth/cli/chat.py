"""`plinth chat`: talk to a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from plinth.cli.generate import load_engine
from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError


@dataclass(frozen=True)
class ChatCommand:
    """Talk to a model: one line is one message, the answer streams. /reset forgets the conversation, /quit ends it.

    Piped input works too, one message a line.
    """

    run: tyro.conf.Positional[Path]
    """a run, a build, or a model folder in Hugging Face's format, with the chat's special tokens"""
    adapter: Path | None = None
    """run with --adapter.rank, or a folder that PEFT saved, whose adapter is merged into the model in memory; None = the model as it is"""
    system: str | None = None
    """system message before the conversation"""
    max_tokens: int = 256
    """tokens of one answer at most"""
    temperature: float = 0.7
    """divisor of the scores; 0 = always the most probable token"""
    top_k: int | None = None
    """choose among this many most probable tokens only"""
    top_p: float | None = None
    """choose among the most probable tokens that together have this probability, 0 to 1"""
    min_p: float | None = None
    """choose among tokens at least this many times as probable as the first one, 0 to 1"""
    seed: int | None = None
    """seed; answer i gets seed + i. None = a fresh one"""
    summarise: bool = False
    """where the context is full, let the model put what is forgotten into one sentence, and keep that"""
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """format of the weights while running; None = bf16 where this processor has our kernels, else fp32"""
    json: bool = False
    """print nothing while talking, and the conversation as one JSON object at the end"""


class Conversation:
    """The messages so far; the oldest exchanges are forgotten when the context is full."""

    def __init__(self, engine, params, system: str | None, summaries: bool = False):
        self.engine = engine
        self.params = params
        self.system = [{"role": "system", "content": system}] if system is not None else []
        self.messages: list[dict[str, str]] = []
        self.num_answers = self.num_dropped = 0
        self.summaries = summaries

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = []

    def _summarise(self):
        """Return what makes a summary of messages by the model itself, or None."""
        if not self.summaries:
            return None
        from dataclasses import replace

        def summarise(messages: list[dict[str, str]]) -> str:
            told = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
            while True:
                question = {"role": "user", "content": f"Summarise this conversation in one sentence.\n{told}"}
                if len(told) < 2 or len(self.engine.render([question])) <= self.engine.engine.max_seq_len // 2:
                    return self.engine.chat([[question]], replace(self.params, temperature=0.0, max_tokens=48))[0].text
                told = told[len(told) // 2 :]  # the newer half

        return summarise

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to one message piece by piece, and remember both.

        Raises UserError when the message alone does not fit the context; it is not remembered then. An answer that is
        broken off stays as far as it came.
        """
        from dataclasses import replace

        from plinth.inference.memory import fit_window

        said = [*self.system, *self.messages, {"role": "user", "content": text}]
        window = fit_window(said, self.engine.engine.max_seq_len - 1, lambda messages: len(self.engine.render(messages)), self._summarise())
        self.num_dropped += len(window.dropped)
        if window.dropped:
            say(f"(the context is full: the oldest {len(window.dropped)} messages are forgotten)")
        messages = window.messages[len(self.system) :]
        params = self.params if self.params.seed is None else replace(self.params, seed=self.params.seed + self.num_answers)
        pieces: list[str] = []
        stream = self.engine.stream_chat(window.messages, params)
        try:
            for delta in stream:
                pieces.append(delta.text)
                yield delta.text
        finally:
            stream.close()
            if pieces:
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
                self.num_answers += 1


def main(argv: list[str]) -> int:
    """Hold a conversation; exit code 0 when the user ends it."""
    command = read_options(ChatCommand, args=argv, prog="plinth chat", description=ChatCommand.__doc__)
    from plinth.inference.sampling import SamplingParams

    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    params = SamplingParams(**{name: getattr(command, name) for name in names})
    engine = load_engine(command.run, command.weights, adapter=command.adapter)
    if not engine.tokenizer.can_chat:
        raise UserError(
            f"{command.run} has neither chat tokens nor a chat template, so it cannot chat. Use `plinth generate` to continue a text."
        )
    conversation = Conversation(engine, params, command.system, command.summarise)
    interactive = sys.stdin.isatty() and not command.json
    if interactive:
        say(f"Talking to {command.run}. /reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer.")
    for line in read_lines(interactive):
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            say("(forgotten)")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is no command. Commands: /reset, /quit.")
        elif line:
            reply(conversation, line, quiet=command.json)
    if command.json:
        result: dict[str, Any] = {"model": str(command.run), "messages": conversation.system + conversation.messages}
        result["dropped_messages"] = conversation.num_dropped
        emit(result, True, lambda console: None)
    return 0


def read_lines(interactive: bool) -> Iterator[str]:
    """Yield the user's lines, stripped, until the input ends."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # Ctrl-C at the prompt leaves, as in other chats; during an answer it only stops the answer
            print()
            return


def reply(conversation: Conversation, text: str, quiet: bool) -> None:
    """Print one answer as it comes. Ctrl-C stops it; a message that does not fit is told and forgotten."""
    answer = conversation.answer(text)
    try:
        for piece in answer:
            if not quiet:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except UserError as error:
        say(f"plinth: {error}")
        return
    except KeyboardInterrupt:
        answer.close()
    if not quiet:
        sys.stdout.write("\n")
        sys.stdout.flush()
