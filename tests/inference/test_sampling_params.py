"""Parameters of a request: what is wrong is named, with the rule and the way out."""

import pytest

from plinth.config import UserError
from plinth.inference.sampling_params import SamplingParams


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0}, "temperature=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"typical_p": 0}, "typical_p=0 keeps no token"),
        ({"typical_p": True}, "typical_p=True"),
        ({"top_k": 0}, "leave it out"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty=inf"),
        ({"presence_penalty": 2.5}, "between -2 and 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty='1'"),
        ({"logit_bias": {-1: 2.0}}, "logit_bias=-1"),
        ({"logit_bias": {5: float("nan")}}, r"logit_bias\[5\]=nan"),
        ({"logit_bias": ((5, 1.0), (5, 2.0))}, "twice"),
        ({"allowed_token_ids": ()}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": (1.5,)}, "allowed_token_ids=1.5"),
        ({"stop_token_ids": ("a",)}, "stop_token_ids='a'"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_tokens": -1}, "min_tokens=-1"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens=9 is more than max_tokens=8"),
        ({"logprobs": -1}, "logprobs=-1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        ({"stop": ("",)}, "empty string"),
        ({"seed": "x"}, "seed='x'"),
        ({"ignore_eos": 1}, "ignore_eos=1"),
    ],
)
def test_wrong_parameters_are_named(fields, says):
    with pytest.raises(UserError, match=says):
        SamplingParams(**fields)


@pytest.mark.parametrize("name, value", [("logit_bias", {50: 1.0}), ("allowed_token_ids", (3, 50)), ("stop_token_ids", (50,))])
def test_ids_outside_the_vocabulary_are_named(name, value):
    params = SamplingParams(**{name: value})
    params.check_ids(51)
    with pytest.raises(UserError, match=f"{name} names token id 50; the vocabulary has ids 0 to 49"):
        params.check_ids(50)


def test_what_ends_a_completion():
    assert SamplingParams(stop_token_ids=(7,)).end_ids((1, 2)) == {1, 2, 7}
    assert SamplingParams(stop_token_ids=(7,), ignore_eos=True).end_ids((1, 2)) == {7}


def test_neutral_values_change_nothing():
    neutral = SamplingParams(repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0, top_p=1.0, min_p=0.0, typical_p=1)
    assert not neutral.needs_history and not neutral.changes_logits and not neutral.ranks_tokens
    assert SamplingParams(logit_bias={3: 1}).logit_bias == ((3, 1.0),)
