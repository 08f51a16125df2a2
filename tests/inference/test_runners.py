"""Which runner a model gets."""

import pytest
import torch

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.native_runner import NativeRunner, why_not_native
from plinth.inference.runners import make_runner
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.torch_runner import TorchRunner


def test_fp32_and_shapes_without_kernels_run_in_torch(make_model):
    assert isinstance(make_runner(make_model(), "fp32"), TorchRunner)
    odd = make_model("odd")  # heads of ten
    assert isinstance(make_runner(odd), TorchRunner) and odd.embed.weight.dtype == torch.float32
    assert isinstance(make_runner(odd, "bf16"), TorchRunner) and odd.embed.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="weights=int8 cannot run"):
        make_runner(make_model("odd"), "int8")


def test_the_default_is_the_native_runner_where_it_can_be(make_model):
    model = make_model("real")
    if reason := why_not_native(model.config):
        pytest.skip(reason)
    runner = make_runner(model)
    assert isinstance(runner, NativeRunner) and runner.weights == "bf16"
    completion = Engine(runner, max_batch=2).generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5))[0]
    assert len(completion.tokens) == 5
