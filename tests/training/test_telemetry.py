"""What a step's line says: energy, cost, CO2, MFU; trackers beside it; and nothing of it ever stops training."""

import json

import pytest
import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.cost import train_flops_per_token
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.training import trackers
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.step import StepResult
from plinth.training.telemetry import Telemetry, TelemetryConfig

CONFIG = DecoderConfig(
    vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48, max_seq_len=16
)


def batches_at(step):
    tokens = torch.randint(40, (4, 13), generator=torch.Generator().manual_seed(step))
    return [(tokens[i : i + 2, :-1], tokens[i : i + 2, 1:]) for i in (0, 2)]


def run_training(path, config, *, resume=False, until=None, told=None):
    run = Run.open(path) if resume else Run.create(path, "pretrain", {"a": 1})
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))

    def batches(step):
        if step == until:
            raise KeyboardInterrupt
        return batches_at(step)

    summary = train(
        run, model, causal_lm_loss, batches,
        TrainConfig(steps=8, dtype="float32", num_threads=2, checkpoint_every_s=0.0, telemetry=config),
        description="test", resume=resume, flops_per_token=train_flops_per_token(CONFIG, 12), matmul_flops_per_s=1e9,
        warn=(told if told is not None else []).append,
    )  # fmt: skip
    return run, summary


def test_energy_cost_and_co2_add_up_over_a_resume(tmp_path):
    config = TelemetryConfig(watts_per_core=18.0, price_per_kwh=0.5, price_per_hour=2.0, co2_g_per_kwh=400.0)
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", config, until=5)
    before = Run(tmp_path / "run").metrics()[-1]["energy_kwh"]
    run, summary = run_training(tmp_path / "run", config, resume=True)
    records = run.metrics()
    energy = [record["energy_kwh"] for record in records]
    assert energy == sorted(energy) and energy[5] >= before > 0 and summary["energy_kwh"] >= energy[-1]
    assert "energy_source" in records[0] and "energy_source" not in records[1]
    assert summary["cost"] == pytest.approx(0.5 * summary["energy_kwh"] + summary["time_s"] / 1800, rel=1e-4)
    assert summary["co2_g"] == pytest.approx(400 * summary["energy_kwh"], rel=1e-4)
    if not summary["energy_measured"]:
        assert summary["energy_source"].startswith("estimate: 2 cores x 18 W")


def test_without_prices_there_is_no_cost_and_no_co2(tmp_path):
    run, summary = run_training(tmp_path / "run", TelemetryConfig())
    assert not {"cost", "co2_g"} & (set(summary) | set(run.metrics()[-1]))


def test_mfu_is_speed_times_flops_over_the_roof(tmp_path):
    run, _ = run_training(tmp_path / "run", TelemetryConfig())
    record = run.metrics()[-1]
    assert record["mfu"] == pytest.approx(record["tokens_per_s"] * train_flops_per_token(CONFIG, 12) / 1e9, rel=1e-3)


@pytest.mark.parametrize("changes", [{"price_per_kwh": -1.0}, {"co2_g_per_kwh": float("inf")}, {"watts_per_core": float("nan")}])
def test_a_price_that_is_none_is_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        TelemetryConfig(**changes)


def test_a_tracker_that_is_not_installed_is_an_error_before_there_is_a_run(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, but its package is not installed.*plinth-fm\[trackers\]"):
        TrainConfig(telemetry=TelemetryConfig(trackers=("wandb",))).resolved(5)
    with pytest.raises(UserError, match="'mlflow' is not one of tensorboard, wandb"):
        TrainConfig(telemetry=TelemetryConfig(trackers=("mlflow",))).resolved(5)


class FailingService:
    """A tracker whose service goes away after two steps."""

    def __init__(self, run, first_step, warn):
        self.logged = []

    def log(self, step, values):
        if len(self.logged) == 2:
            raise ConnectionError("the network is gone")
        self.logged.append((step, values))

    def close(self):
        raise ConnectionError("still gone")


def test_a_tracker_that_fails_is_told_of_once_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers.TRACKERS, "json", FailingService)  # a name that is installed everywhere
    told = []
    run, _ = run_training(tmp_path / "run", TelemetryConfig(trackers=("json",)), told=told)
    assert len(run.metrics()) == 8
    assert told == ["json failed at step 3 and gets nothing more: the network is gone. metrics.jsonl has every step."]


def test_values_that_are_not_finite_are_null_on_every_line(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", {})
    with Telemetry(run, TelemetryConfig(), cores=1) as telemetry:
        telemetry.begin(0)
        telemetry.log(1, StepResult(float("nan"), 5, float("inf"), {"margin": float("-inf")}), lr=0.1, step_s=1.0, time_s=1.0, tokens=5)
    line = (run.path / "metrics.jsonl").read_text()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss_nats"] is None and record["grad_norm"] is None and record["margin"] is None and record["tokens_per_s"] == 5


def test_tensorboard_holds_every_step_once_after_a_resume(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    config = TelemetryConfig(trackers=("tensorboard",))
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "run", config, until=5)
    run, _ = run_training(tmp_path / "run", config, resume=True)
    read = events.EventAccumulator(str(run.path / "tensorboard"))
    read.Reload()
    found = read.Scalars("loss_nats")
    assert [event.step for event in found] == list(range(1, 9))
    assert [event.value for event in found] == pytest.approx([record["loss_nats"] for record in run.metrics()], rel=1e-6)
    assert {"lr", "grad_norm", "tokens_per_s", "mfu", "energy_kwh"} <= set(read.Tags()["scalars"])


def test_wandb_works_offline_without_an_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    told = []
    run, _ = run_training(tmp_path / "run", TelemetryConfig(trackers=("wandb",)), told=told)
    files = list((run.path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0 and not told
