"""Constitutional AI, the supervised half: a model criticises its own answer by a principle and writes it anew, for some rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from plinth.inference.chat_model import BATCH, ChatModel, Conversation
from plinth.inference.sampling_params import SamplingParams
from plinth.posttraining.feedback_config import RevisionConfig
from plinth.posttraining.principles import draw_principles
from plinth.tokenizer.chat import Message


@dataclass(frozen=True)
class Revised:
    """A prompt's answers, the first one and each that was written anew."""

    prompt: Conversation
    """messages before the answer"""
    answers: tuple[str, ...]
    """the first answer, then one a round"""
    critiques: tuple[str, ...]
    """one a round"""
    principles: tuple[str, ...]
    """one a round"""
    finished: bool
    """whether no answer was cut off for its length"""

    def origin(self) -> dict[str, Any]:
        """Return where the last answer comes from, for the files that it is written to."""
        return {"first_answer": self.answers[0], "principles": list(self.principles), "critiques": list(self.critiques)}


def revise_answers(
    model: ChatModel,
    prompts: Sequence[Conversation],
    principles: Sequence[str],
    config: RevisionConfig,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Revised]:
    """Answer each prompt, then let the model criticise its answer and write it anew, config.rounds times.

    Each request stands in a conversation of the prompt, the last answer and the critique alone: earlier rounds are not shown.
    Source: Bai et al. 2022, arXiv:2212.08073, section 3.1.  Differs: no examples are shown, and one text asks for every principle.
    """
    found: list[Revised] = []
    for start in range(0, len(prompts), BATCH):
        found += _revise(model, prompts[start : start + BATCH], principles, config, start)
        progress(len(prompts[start : start + BATCH]))
    return found


def _revise(
    model: ChatModel, prompts: Sequence[Conversation], principles: Sequence[str], config: RevisionConfig, first: int
) -> list[Revised]:
    asked = 1 + 2 * config.rounds  # times that each prompt's model is asked: a seed for each

    def ask(conversations: Sequence[Conversation], turn: int):
        seeds = [(config.seed << 32) + asked * (first + i) + turn for i in range(len(conversations))]
        return model.answers(
            conversations, [SamplingParams(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed) for seed in seeds]
        )

    answers = [ask(prompts, 0)]
    critiques, drawn = [], []
    for turn in range(config.rounds):
        drawn.append(draw_principles(list(principles), len(prompts), config.seed, first, turn))
        before = [
            [*prompt, _said("assistant", answer.text), _said("user", config.critique.replace("{principle}", principle))]
            for prompt, answer, principle in zip(prompts, answers[-1], drawn[-1])
        ]
        critiques.append(ask(before, 2 * turn + 1))
        again = [
            [*turns, _said("assistant", critique.text), _said("user", config.revise)] for turns, critique in zip(before, critiques[-1])
        ]
        answers.append(ask(again, 2 * turn + 2))
    return [
        Revised(
            prompt,
            tuple(each[i].text.strip() for each in answers),
            tuple(each[i].text for each in critiques),
            tuple(each[i] for each in drawn),
            all(each[i].finished for each in answers),
        )
        for i, prompt in enumerate(prompts)
    ]


def _said(role: str, text: str) -> Message:
    return {"role": role, "content": text}
