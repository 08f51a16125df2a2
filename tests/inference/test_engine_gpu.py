"""The engine with its model on a GPU: the same tokens as on the processor, where rounding leaves no doubt."""

import pytest
import torch

from plinth.inference.engine import Engine
from plinth.inference.sampling_params import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")]


def test_a_gpu_gives_the_processors_tokens(make_model, make_prompts):
    prompts = make_prompts((3, 40, 130))
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=2, prompt_logprobs=0)
    expected = Engine(make_model(), max_batch=4).generate(prompts, params)
    engine = Engine(make_model().cuda(), max_batch=4)
    for done, wanted in zip(engine.generate(prompts, params), expected):
        assert done.tokens == wanted.tokens
        torch.testing.assert_close(torch.tensor(done.logprobs), torch.tensor(wanted.logprobs), atol=1e-3, rtol=1e-3)
    assert engine.embed(prompts).is_cuda
    with engine.search() as space:
        first, logits = space.start(prompts[1])
        assert int(logits.argmax()) == expected[1].tokens[0]
        space.extend([first, space.fork(first)], expected[1].tokens[:2])
    engine.check_integrity()
