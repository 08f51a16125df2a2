"""From prompts and a constitution to revised answers, and pairs of them with the first ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from plinth.config import UserError, save_json, to_dict
from plinth.inference.chat_model import ChatModel, KeptAnswers
from plinth.posttraining.principles import read_principles
from plinth.posttraining.prompts import read_prompts
from plinth.posttraining.revision import RevisionConfig, revise_answers
from plinth.recipes.feedback import KEPT_FILE, refuse_other, write_lines
from plinth.run import Progress, file_sha256


def make_revisions(
    model: ChatModel, data: Path, principles: Path, out: Path, config: RevisionConfig, warn: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Let a model answer the prompts of `data` and revise its answers; write out/sft.jsonl and out/pairs.jsonl, and return the report.

    sft.jsonl has each prompt with its last answer, pairs.jsonl the last answer as chosen and the first as rejected. Prompts of which an
    answer was cut off or is empty are left out of both, and those whose answer did not change of the pairs; all are counted.
    What the model said is kept in out/asked.jsonl: called again after an interruption, this goes on from there.
    """
    refuse_other(out, "prompts", data)
    prompts = read_prompts(data)
    known = read_principles(principles)
    kept = KeptAnswers(model, out / KEPT_FILE)
    with Progress(len(prompts), "revising", "prompt") as progress:
        found = revise_answers(kept, [prompt.messages for prompt in prompts], known, config, progress.update)
    whole = [each for each in found if each.finished and each.answers[-1]]
    if not whole:
        raise UserError(f"no answer to {len(prompts)} prompts is whole: raise max_tokens={config.max_tokens}, or take another model.")
    if len(whole) < len(found):
        warn(
            f"{len(found) - len(whole)} of {len(found)} prompts left out: an answer was cut off at max_tokens={config.max_tokens} or empty"
        )
    changed = [each for each in whole if each.answers[0] != each.answers[-1]]
    write_lines(
        out / "sft.jsonl",
        ({"messages": [*r.prompt, {"role": "assistant", "content": r.answers[-1]}], "revision": r.origin()} for r in whole),
    )
    write_lines(
        out / "pairs.jsonl",
        ({"prompt": r.prompt, "chosen": r.answers[-1], "rejected": r.answers[0], "revision": r.origin()} for r in changed),
    )
    report = {
        "model": model.identity,
        "prompts": {"path": str(data), "sha256": file_sha256(data), "count": len(prompts)},
        "principles": {"path": str(principles), "sha256": file_sha256(principles), "count": len(known)},
        "config": to_dict(config),
        "left_out": len(found) - len(whole),
        "unchanged": len(whole) - len(changed),
        "sft_rows": len(whole),
        "pairs": len(changed),
        "asked": kept.asked,
        "known": kept.known,
    }
    save_json(out / "report.json", report)
    return report
