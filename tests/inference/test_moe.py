"""The engine on decoders with experts: the scores of the training path, and batches equal to their singles."""

import pytest
import torch

from plinth.inference.engine import Engine
from plinth.inference.native_runner import why_not_native
from plinth.inference.sampling import SamplingParams

EXPERTS = {"num_experts": 6, "num_active_experts": 2, "expert_intermediate_size": 24}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 20, "shared_expert_gate": True, "norm_topk_prob": False, "dense_layers": (1,)}
GREEDY = SamplingParams(temperature=0, max_tokens=10, logprobs=2)


@pytest.mark.parametrize("options", [EXPERTS, SHARED], ids=["experts", "shared"])
def test_generated_tokens_have_the_log_probabilities_of_the_training_path(make_model, make_prompts, options):
    model, prompts = make_model("grouped", num_layers=3, **options), make_prompts((1, 5, 33))
    for prompt, completion in zip(prompts, Engine(model, max_batch=3).generate(prompts, GREEDY)):
        whole = torch.tensor([prompt + completion.tokens])
        with torch.no_grad():
            log_probs = torch.log_softmax(model.logits(model(whole))[0].float(), -1)[len(prompt) - 1 : -1]
        assert completion.tokens == log_probs.argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(completion.logprobs), log_probs.amax(-1), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "dtype"), [(EXPERTS, torch.float32), (SHARED, torch.float32), (SHARED, torch.bfloat16)], ids=["experts", "shared", "bf16"]
)
def test_a_batch_equals_its_singles_bit_for_bit(make_model, make_prompts, options, dtype):
    model, prompts = make_model("odd", dtype, num_layers=2, **options), make_prompts((1, 17, 40))
    params = [GREEDY, SamplingParams(seed=1, max_tokens=8), GREEDY]
    together = Engine(model, max_batch=5).generate(prompts, params)
    alone = [Engine(model, max_batch=1).generate([prompt], [wanted])[0] for prompt, wanted in zip(prompts, params)]
    assert together == alone


def test_the_native_kernels_name_what_they_lack(make_model):
    reason = why_not_native(make_model("real", num_layers=1, **EXPERTS).config)
    assert reason is not None and ("num_experts" in reason or "processor" in reason or "compiler" in reason)
