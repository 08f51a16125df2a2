"""The engine on a decoder with every extra: the scores of the training path, and batches equal to their singles."""

import pytest
import torch

from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams

EXTRAS = {"logit_softcap": 4.0, "activation": "relu2", "residual_scalars": True, "value_embeddings": True}
GREEDY = SamplingParams(temperature=0, max_tokens=10, logprobs=2)


@pytest.mark.parametrize("shape", ["grouped", "odd"])
def test_generated_tokens_have_the_log_probabilities_of_the_training_path(make_model, make_prompts, shape):
    model, prompts = make_model(shape, num_layers=3, **EXTRAS), make_prompts((1, 5, 33, 70))
    for prompt, completion in zip(prompts, Engine(model, max_batch=3).generate(prompts, GREEDY)):
        whole = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            log_probs = torch.log_softmax(model.logits(model(whole))[0].float(), -1)[len(prompt) - 1 : -1]
        assert completion.tokens == log_probs.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), log_probs.amax(-1), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", ["odd", "real"])
def test_a_batch_equals_its_singles_bit_for_bit(make_model, make_prompts, shape, dtype):
    model, prompts = make_model(shape, dtype, num_layers=3, **EXTRAS), make_prompts((1, 15, 17, 64, 130))
    params = [GREEDY, SamplingParams(seed=1, max_tokens=12)] * 2 + [GREEDY]
    together = Engine(model, max_batch=5).generate(prompts, params)
    alone = [Engine(model, max_batch=1).generate([prompt], [wanted])[0] for prompt, wanted in zip(prompts, params)]
    assert together == alone
