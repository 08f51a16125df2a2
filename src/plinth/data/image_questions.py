"""Questions on an image as tokens: places for the image, the question, and the answer that is learnt."""

from __future__ import annotations

import tokenizers

from plinth.config import UserError
from plinth.models.vision_language import VisionLanguageConfig
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import ASSISTANT, END, USER, Tokenizer

IMAGE = "<image>"  # LLaVA's name of the token whose places an image's patches take
CAPTION_QUESTION = "What does the image show?"
LLAVA_PROMPT = f"USER: {IMAGE}\n{{question}} ASSISTANT:"  # LLaVA 1.5's, for tokenizers without header tokens


def with_image_token(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with the special token <image>, behind all others; one that has it is returned as it is."""
    if tokenizer.token_id(IMAGE) is not None:
        return tokenizer
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_json())
    backend.add_special_tokens([IMAGE])
    extended = Tokenizer(backend, tokenizer.config)
    extended.generation_ends = tokenizer.generation_ends
    return extended


def question_tokens(
    tokenizer: Tokenizer, config: VisionLanguageConfig, question: str, answer: str | None = None, prompt: str | None = None
) -> Rendered:
    """Return the tokens of a question on one image, with an answer to learn or ready for one, and which of them are learnt.

    With a tokenizer of ours the image stands first in the user's turn. Another's takes `prompt`, a text with <image> and {question}
    (default: LLaVA 1.5's), behind what the tokenizer puts before each text. Raises UserError for a prompt without the two, or a question
    longer than the model's context.
    """
    image = [config.image_id] * config.image_tokens
    user, assistant, end = (tokenizer.special_id(name) for name in (USER, ASSISTANT, END))
    if prompt is None and None not in (user, assistant, end):
        tokens = [user, *image, *tokenizer.encode(question), end, assistant]
        tail = [] if answer is None else [*tokenizer.encode(answer), end]
    else:
        tokens = _written(tokenizer, prompt or LLAVA_PROMPT, question, image)
        tail = [] if answer is None else [*tokenizer.encode(f" {answer}"), *tokenizer.end_ids[:1]]
    if len(tokens) + len(tail) > config.max_seq_len:
        raise UserError(
            f"a question of {len(tokens) + len(tail)} tokens, {config.image_tokens} of them the image's, exceeds max_seq_len="
            f"{config.max_seq_len}. Shorten it, or take a model with a longer context."
        )
    return Rendered([*tokens, *tail], [False] * len(tokens) + [True] * len(tail))  # type: ignore[list-item]


def _written(tokenizer: Tokenizer, prompt: str, question: str, image: list[int]) -> list[int]:
    if prompt.count(IMAGE) != 1 or "{question}" not in prompt:
        raise UserError(f"prompt={prompt!r} must hold {IMAGE} once, and {{question}}. LLaVA 1.5's is {LLAVA_PROMPT!r}.")
    before, behind = prompt.replace("{question}", question).split(IMAGE, 1)
    return [*tokenizer.prefix_ids, *tokenizer.encode(before), *image, *tokenizer.encode(behind)]
