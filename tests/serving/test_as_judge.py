"""Our server as the model that feedback asks: the same probabilities as through the engine."""

import pytest

from plinth.inference.endpoint import Endpoint, EndpointConfig
from plinth.inference.local_model import LocalModel
from plinth.inference.sampling_params import SamplingParams


def test_options_and_answers_equal_the_engines(make_text_engine, base_url):
    local = LocalModel(make_text_engine(), {})
    served = Endpoint(EndpointConfig(url=f"{base_url}/v1", model="tiny"))
    conversation = [{"role": "user", "content": "def main"}]
    best = local.text.chat([conversation], SamplingParams(temperature=0.0, max_tokens=1, logprobs=20))[0].top_logprobs[0]
    names = [local.text.tokenizer.decode([token]) for token, _ in best]
    options = [name for name in names if name.strip().isascii() and name == name.strip() and [n.strip() for n in names].count(name) == 1][
        :2
    ]
    assert len(options) == 2
    given, expected = (model.option_logprobs([conversation], options)[0] for model in (served, local))
    assert given == pytest.approx(expected, abs=1e-4)
    params = [SamplingParams(temperature=1.0, max_tokens=5, seed=seed) for seed in (1, 2)]
    assert served.answers([conversation] * 2, params) == local.answers([conversation] * 2, params)
