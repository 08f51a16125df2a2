"""How questions are asked: phrasings for training, and others, never trained on, for evaluation."""

from __future__ import annotations

KINDS = ("describe", "module", "signature", "returns")

TRAIN = {
    "describe": (
        "What does {name} do?",
        "What does `{name}` do?",
        "What is {name} for?",
        "Describe {name}.",
        "Explain what {name} does.",
        "Tell me what `{name}` does.",
        "What is the purpose of {name}?",
        "In Python, what does {name} do?",
    ),
    "module": (
        "Which module has {name}?",
        "Which module has `{name}`?",
        "In which module is {name}?",
        "Where is {name} defined?",
        "Name the module of {name}.",
        "Tell me the module that contains `{name}`.",
        "From which module do I import {name}?",
        "In Python, which module provides {name}?",
    ),
    "signature": (
        "What is the signature of {name}?",
        "What is the signature of `{name}`?",
        "Which parameters does {name} take?",
        "What arguments does {name} accept?",
        "Show the signature of {name}.",
        "Tell me the parameters of `{name}`.",
        "How do I call {name}?",
        "In Python, what are the parameters of {name}?",
    ),
    "returns": (
        "What does {name} return?",
        "What does `{name}` return?",
        "What is returned by {name}?",
        "What is the return value of {name}?",
        "Name what {name} returns.",
        "Tell me what `{name}` returns.",
        "What do I get back from {name}?",
        "In Python, what does {name} return?",
    ),
}
"""Phrasings of sft.jsonl and pairs.jsonl."""

EVALUATION = {
    "describe": (
        "Can you tell me what {name} does?",
        "What is `{name}` used for?",
        "Please explain the purpose of {name}.",
    ),
    "module": (
        "Can you tell me which module has {name}?",
        "What module is `{name}` in?",
        "Please name the module that provides {name}.",
    ),
    "signature": (
        "Can you show me the signature of {name}?",
        "What parameters does `{name}` have?",
        "Please tell me the arguments of {name}.",
    ),
    "returns": (
        "Can you tell me what {name} returns?",
        "What value does `{name}` return?",
        "Please name the return value of {name}.",
    ),
}
"""Phrasings of questions.jsonl; none is in TRAIN."""
