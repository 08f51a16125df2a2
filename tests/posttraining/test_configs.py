"""What makes no run is refused before it begins, by every stage: numbers out of range, a run of another stage, other data."""

import math

import pytest

from plinth.config import UserError
from plinth.posttraining.distill_config import DistillConfig, TeacherFileConfig
from plinth.posttraining.grpo_config import GrpoConfig
from plinth.posttraining.preference_config import DpoConfig
from plinth.posttraining.reward_tuning import RewardTuning
from plinth.posttraining.sft_config import SftConfig
from plinth.posttraining.text_classification import TransferClassifyConfig
from plinth.recipes.language_model_finetuning import LmFinetuneConfig
from plinth.run import Run
from plinth.training.job import reopen
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig


@pytest.mark.parametrize("config", [SftConfig, DpoConfig, DistillConfig, RewardTuning, TransferClassifyConfig, LmFinetuneConfig])
def test_no_stage_begins_without_passes_or_with_micro_batches_of_nothing(config):
    for values, words in (
        ({"epochs": 0}, "epochs=0 must be positive"),
        ({"epochs": math.inf}, "epochs=inf must be positive"),
        ({"epochs": math.nan}, "epochs=nan must be positive"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            config(**values)


@pytest.mark.parametrize(
    "config, values",
    [
        (SftConfig, {"conversations_per_step": 0}), (SftConfig, {"max_seq_len": 0}), (SftConfig, {"tokens": 0}),
        (SftConfig, {"embedding_noise": -1.0}), (DpoConfig, {"pairs_per_step": 0}), (DpoConfig, {"beta": math.nan}),
        (GrpoConfig, {"rollouts": 0}), (GrpoConfig, {"kl_coef": math.nan}), (GrpoConfig, {"mismatch_cap": -1.0}),
        (GrpoConfig, {"epochs": 0}), (TeacherFileConfig, {"top_k": 0}), (TeacherFileConfig, {"temperature": math.nan}),
        (DpoConfig, {"max_seq_len": -1}), (DistillConfig, {"tokens": 0}), (RewardTuning, {"max_seq_len": 0}),
        (TrainConfig, {"seed": -1}), (TrainConfig, {"num_threads": 0}), (TrainConfig, {"warmup_steps": -1}),
        (TrainConfig, {"clip_grad_norm": math.nan}), (OptimizerConfig, {"lr": math.nan}), (OptimizerConfig, {"weight_decay": -0.1}),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_named(config, values):
    with pytest.raises(UserError, match="{}={} must be".format(*next(iter(values.items())))):
        config(**values)


def test_dpo_is_sent_to_the_name_that_its_loss_has():
    with pytest.raises(UserError, match="'dpo' is not one of .* DPO is sigmoid"):
        DpoConfig(loss="dpo")


def test_a_run_is_gone_on_with_by_its_own_stage_and_a_finished_one_says_that_other_data_are_not_read(tmp_path):
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    data.write_text("one\n")
    other.write_text("another\n")
    said = []
    Run.create(tmp_path / "run", "sft", {}, [data])
    with pytest.raises(UserError, match="holds a run of stage sft, not dpo"):
        reopen(tmp_path / "run", "dpo", [data], said.append)
    reopen(tmp_path / "run", "sft", [other], said.append)  # unfinished: the checkpoint knows its data
    assert not said
    Run(tmp_path / "run").finish({"steps": 1})
    assert reopen(tmp_path / "run", "sft", [data], said.append).is_done and not said
    reopen(tmp_path / "run", "sft", [other], said.append)
    assert "run is finished and was not made of" in said[0] and "other.jsonl: nothing is trained" in said[0]
