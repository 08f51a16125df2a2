"""What the numbers in metrics.jsonl are called, their unit, and what to make of them; of every stage."""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """How a logged number is spoken of."""

    label: str
    """its name for readers"""
    unit: str = ""
    """nats, tokens, share, ...; empty where it has none"""
    about: str = ""
    """one line on how to read it"""


WORDS = {
    "loss_nats": Words("loss", "nats", "What the step makes smaller: per token, pair or completion, as the stage counts."),
    "heldout_loss_nats": Words(
        "held-out loss", "nats", "On examples that are not trained on; when it rises, training has gone on too long."
    ),
    "accuracy": Words(
        "right", "share", "Pairs whose chosen answer scores above the rejected one (0.5 is a coin); with labels, texts whose label is told."
    ),
    "nll_nats": Words("loss without penalties", "nats", "Of an AWD-LSTM: what the penalties on its outputs leave out."),
    "learning_groups": Words("groups that learn", "", "Of layers, from the top: one more with each step of gradual unfreezing."),
    "margin": Words("reward margin", "nats", "How far chosen answers score above rejected ones."),
    "reward": Words("reward", "", "Mean reward of the sampled completions."),
    "score": Words("score", "", "Reward of the completion without the penalty for leaving the reference."),
    "mean_score": Words("mean score", "", "Of all answers, the worse ones too; only differences within a prompt say anything."),
    "kl": Words("distance to the reference", "nats", "Kullback-Leibler divergence a completion; the price of the reward."),
    "entropy": Words("entropy", "nats", "How undecided the policy is a token; a fall to zero means that it says one thing only."),
    "clip_fraction": Words("clipped", "share", "Tokens whose ratio left the clipping range, so that they gave no gradient."),
    "value_clip_fraction": Words("values clipped", "share", "Values that moved further than the clipping range."),
    "value_loss": Words("value loss", "", "Squared error of the critic."),
    "policy_loss": Words("policy loss", "", "Clipped surrogate; its level says little, its trend less: read the reward."),
    "explained_variance": Words("critic's explained variance", "", "1 is a perfect critic; at or below 0 the critic is of no use."),
    "chosen_log_prob": Words("log-probability, chosen", "nats", "When it falls together with the rejected one's, likelihood is displaced."),
    "rejected_log_prob": Words("log-probability, rejected", "nats"),
    "chosen_fell": Words("chosen answers that fell", "share", "Pairs whose chosen answer is less likely than before tuning."),
    "chosen_tokens": Words("length, chosen", "tokens"),
    "rejected_tokens": Words("length, rejected", "tokens"),
    "zero_spread_groups": Words("groups without spread", "share", "Prompts whose completions all got one reward: they teach nothing."),
    "completion_tokens": Words("length of completions", "tokens", "Growth without reward is padding."),
    "finished": Words("completions that ended", "share", "The others were cut off at the length limit."),
    "cross_entropy_nats": Words("cross-entropy, student", "nats", "Of the data's tokens; what distillation leaves to the data."),
    "teacher_cross_entropy_nats": Words("cross-entropy, teacher", "nats", "Of the same tokens: what the student is to come near."),
    "same_first_choice": Words("same first choice", "share", "Positions where student and teacher hold the same token most probable."),
    "own_answers": Words("answers of its own", "share", "Examples of the update whose answer the student wrote."),
    "engine_gap": Words("engine against trainer", "nats", "Largest difference of a token's log-probability; in fp32 below 1e-5."),
    "kl_sampler": Words("distance to the sampler", "nats", "From the policy that wrote the completions to the one in training, a token."),
    "kl_token": Words("KL in the loss", "nats", "To the reference, a token, by the estimator that the loss has."),
    "ptx_loss": Words("pretraining loss", "nats", "Of the pretraining mix, times its weight."),
    "gold": Words("known reward", "", "Of the same completions, beside the reward that is learnt from."),
    "objective": Words("reward less KL", "", "What is maximised: score minus the penalty for leaving the reference."),
    "rejected_rows": Words("rows that could not be read", "", "Of the data, each told with its number and the reason."),
    "too_long_rows": Words("rows left out as too long", "", "Of the data, having more tokens than the model reads."),
    "unusable_rows": Words("rows with nothing to learn or to ask", "", "Of the data, left out though they could be read."),
    "cut_rows": Words("rows cut", "", "Of the data, used without some of their tokens, being too long."),
    "lr": Words("learning rate"),
    "grad_norm": Words("gradient norm", "", "Before clipping; jumps point at bad batches."),
    "tokens_per_s": Words("speed", "counted tokens/s"),
    "mfu": Words("use of the machine", "share", "Model FLOPs against this machine's measured peak."),
}

GROUPS = (
    ("What is learnt", ("loss_nats", "nll_nats", "heldout_loss_nats", "accuracy", "margin", "mean_score", "reward", "score", "gold",
                        "objective", "ptx_loss", "cross_entropy_nats", "teacher_cross_entropy_nats", "same_first_choice", "policy_loss",
                        "value_loss", "explained_variance")),
    ("How far the model moves", ("kl", "kl_token", "kl_sampler", "engine_gap", "entropy", "clip_fraction", "value_clip_fraction",
                                 "chosen_log_prob", "rejected_log_prob", "chosen_fell")),
    ("Answers", ("completion_tokens", "finished", "own_answers", "chosen_tokens", "rejected_tokens", "zero_spread_groups")),
    ("The optimizer", ("lr", "learning_groups", "grad_norm", "tokens_per_s", "mfu")),
)  # fmt: skip


def words_of(name: str) -> Words:
    """Return how a logged number is spoken of; one that is not known here keeps its name."""
    return WORDS.get(name) or Words(name.replace("_", " "))
