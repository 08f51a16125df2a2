"""Spikes and non-finite updates: found, traced to their rows, warned of, left out or stopped at; the same after a resume."""

from dataclasses import replace

import pytest
import torch

from data.files import write_shards
from plinth.config import UserError
from plinth.data.loader import TokenLoader
from plinth.data.shards import open_split
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.run import Run
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.precision import MasterWeights
from plinth.training.spikes import BadBatchError, SpikeConfig, SpikeGuard, trace_rows
from plinth.training.step import StepResult, open_workers, train_step

CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=48,
    max_seq_len=16,
    tie_embeddings=False,
)
POISON = 39  # a token that the ordinary batches do not hold


def guard(told=None, **config):
    return SpikeGuard(
        SpikeConfig(**config),
        lambda step, measure: ((step,), f"{measure} of {step}"),
        advice="",
        warn=([] if told is None else told).append,
    )


def usual(step):
    return StepResult(3.0 + 0.1 * (step % 3), 10, 1.0 + 0.05 * (step % 5))


def test_a_jump_of_the_loss_or_of_the_norm_is_a_spike_and_a_slow_rise_is_none():
    told = []
    watching = guard(told)
    for step in range(40):
        assert watching.allows(step, usual(step)) and watching.incident is None
    assert watching.allows(40, StepResult(3.4, 10, 1.3)) and not told
    assert watching.allows(41, StepResult(5.0, 10, 1.0))
    assert watching.incident.event == "spike" and watching.incident.documents == "loss of 41" and "loss 5 after a median of 3.1" in told[0]
    assert watching.allows(42, StepResult(3.0, 10, 40.0))
    assert watching.incident.documents == "grad_norm of 42" and "gradient norm 40" in watching.incident.reason
    for step in range(43, 300):
        assert watching.allows(step, StepResult(3.0 + 0.01 * step, 10, 1.02 ** (step - 43))) and watching.incident is None


def test_nothing_is_a_spike_before_there_is_a_window_and_what_falls_is_none():
    watching = guard()
    for step in range(80):
        assert watching.allows(step, StepResult(10.0 if step < 10 else 10.0 * 0.9 ** (step - 9), 10, 50.0 * 0.8**step))
        assert watching.incident is None


def test_updates_without_a_gradient_are_no_measure_for_others():
    watching, resumed = guard(), guard()
    results = [StepResult(0.0, 10, 0.0)] * 100 + [StepResult(0.1, 10, 5.0)] * 3 + [StepResult(0.0, 10, 0.0)] * 70
    for step, result in enumerate(results):  # as where most roll-outs have equal rewards
        assert watching.allows(step, result) and watching.incident is None
    resumed.restore([{"step": i + 1, "loss_nats": r.loss_nats, "grad_norm": r.grad_norm} for i, r in enumerate(results)])
    assert [*watching._log_norms] == [*resumed._log_norms] and len(watching._log_norms) == 3


def test_left_out_updates_do_not_move_the_window_and_too_many_in_a_row_stop():
    watching = guard(on_spike="skip", on_nonfinite="skip", max_skips=3)
    for step in range(30):
        watching.allows(step, usual(step))
    for step in range(30, 33):
        assert not watching.allows(step, StepResult(float("nan") if step == 31 else 9.0, 10, 1.0))
        assert watching.incident.action == "skip"
    with pytest.raises(BadBatchError, match="stopped before update 34: .* 3 updates in a row were left out"):
        watching.allows(33, StepResult(9.0, 10, 1.0))


def test_a_restored_guard_judges_like_one_that_was_never_stopped():
    def judge(watching, steps):
        values = [9.0 if step in (37, 38, 71) else 3.0 + 0.1 * (step % 3) for step in steps]
        return [watching.allows(step, StepResult(value, 10, 1.0)) for step, value in zip(steps, values)], values

    whole, values = judge(guard(on_spike="skip"), range(90))
    assert whole.count(False) == 3
    for cut in (5, 37, 38, 39, 60):
        records = [
            {"step": step + 1, "loss_nats": value, "grad_norm": 1.0} | ({} if made else {"skipped": True})
            for step, (value, made) in enumerate(zip(values[:cut], whole))
        ]
        resumed = guard(on_spike="skip")
        resumed.restore(records)
        assert judge(resumed, range(cut, 90))[0] == whole[cut:], cut


def batches_at(step, poisoned=(), where=5):
    """Two micro-batches of two rows, three steps' worth over and over; a poisoned step's third row holds the poisoned token."""
    tokens = torch.randint(POISON, (4, 13), generator=torch.Generator().manual_seed(step % 3))
    if step in poisoned:
        tokens[2, where] = POISON
    return [(tokens[i : i + 2, :-1], tokens[i : i + 2, 1:]) for i in (0, 2)]


def poisoned_model(value):
    """A model in which the embedding of the poisoned token is corrupted, unless `value` is None."""
    model = Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        if value is None:
            return model
        dict(model.named_parameters())["embed.weight"][POISON] = value
    return model


def run_training(path, poisoned, value, *, where=5, resume=False, until=None, told=None, **spikes):
    run = Run.open(path) if resume else Run.create(path, "pretrain", {})
    model = poisoned_model(value)
    config = TrainConfig(
        steps=40, warmup_steps=2, dtype="float32", num_threads=2, checkpoint_every_s=0.0, spikes=SpikeConfig(**spikes),
        optimizer=OptimizerConfig(lr=1e-3, muon_lr=5e-3),
    )  # fmt: skip

    def batches(step):
        if step == until:
            raise KeyboardInterrupt
        return batches_at(step, poisoned, where)

    train(
        run, model, causal_lm_loss, batches, config, description="test", resume=resume, warn=([] if told is None else told).append,
        describe_batch=lambda step, rows: " and ".join(f"document {100 * step + row}" for row in rows),
    )  # fmt: skip
    return run, model.state_dict()


def test_a_corrupted_embedding_row_is_traced_to_the_one_row_that_uses_it(tmp_path):
    with pytest.raises(UserError, match="stopped before update 31: .*Batch: document 3002.* set on_spike or on_nonfinite") as caught:
        run_training(tmp_path / "run", {30}, float("inf"))
    assert caught.value.incident.rows == (2,)
    record = Run(tmp_path / "run").metrics()[-1]
    assert (record["step"], record["event"], record["documents"]) == (31, "non-finite", "document 3002")
    assert Run(tmp_path / "run").last_step == 30


def test_a_left_out_update_changes_nothing_and_a_resumed_run_leaves_out_the_same(tmp_path):
    whole_run, whole = run_training(tmp_path / "whole", {25, 30}, float("nan"), on_nonfinite="skip")
    with pytest.raises(KeyboardInterrupt):
        run_training(tmp_path / "cut", {25, 30}, float("nan"), until=27, on_nonfinite="skip")
    _, resumed = run_training(tmp_path / "cut", {25, 30}, float("nan"), resume=True, on_nonfinite="skip")
    skipped = [record["step"] for record in whole_run.metrics() if record.get("skipped")]
    assert skipped == [26, 31] and all(torch.equal(whole[name], resumed[name]) for name in whole if not whole[name].isnan().any())
    lines = (whole_run.path / "metrics.jsonl").read_text()
    assert "NaN" not in lines and lines.count("\n") == 40
    assert whole_run.metrics()[25]["loss_nats"] is None and whole_run.metrics()[25]["rows"] == [2]


def test_a_document_like_no_other_makes_a_spike_and_is_named(tmp_path):
    told = []
    run, _ = run_training(tmp_path / "run", {30}, None, where=slice(None), told=told, on_spike="skip")
    events = [record for record in run.metrics() if record.get("event")]
    assert [(record["step"], record["event"], record["action"]) for record in events] == [(31, "spike", "skip")]
    assert events[0]["rows"][0] == 2 and events[0]["documents"].startswith("document 3002") and told[0].startswith("update 31 left out")


def test_a_refused_update_leaves_weights_and_optimizer_as_they_were():
    masters = MasterWeights(Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), torch.float32)
    optimizer = build_optimizer(masters, OptimizerConfig())
    with open_workers(2) as workers:
        train_step(masters, causal_lm_loss, batches_at(0), optimizer, workers)
        before = [tensor.clone() for tensor in (*masters.tensors.values(), *optimizer.state.values(), *masters.parameters)]
        result = train_step(masters, causal_lm_loss, batches_at(1), optimizer, workers, allows=lambda measured: False)
    after = [*masters.tensors.values(), *optimizer.state.values(), *masters.parameters]
    assert not result.applied and optimizer.num_updates == 1 and all(torch.equal(a, b) for a, b in zip(before, after))


def test_rows_are_ranked_by_their_own_loss_and_gradient():
    masters = MasterWeights(poisoned_model(None), torch.float32)
    rows = [(inputs[i : i + 1], targets[i : i + 1]) for inputs, targets in batches_at(1) for i in (0, 1)]
    losses, norms = [], []
    for row in rows:
        loss, count, _ = causal_lm_loss(masters.model, row)
        grads = torch.autograd.grad(loss / count, masters.parameters)
        losses.append(loss.item())
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
    for measure, values in (("loss", losses), ("grad_norm", norms)):
        ranked = sorted(range(4), key=lambda row: -values[row])[:3]
        assert list(trace_rows(masters, causal_lm_loss, batches_at(1), measure)) == ranked
    assert trace_rows(masters, causal_lm_loss, [{"inputs": 1}], "loss") == ()


@pytest.mark.parametrize("changes", [{"window": 3}, {"threshold": 0.0}, {"max_skips": 0}])
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(UserError, match=next(iter(changes))):
        SpikeConfig(**changes)


def test_a_poisoned_document_of_real_shards_is_named(tmp_path):
    """One document holds a token whose embedding is corrupted; the message names that document, found by the loader itself."""
    folder = write_shards(tmp_path / "shards", [30] * 40)
    loader = TokenLoader(folder, 16, 4, seed=1)
    token = int(open_split(folder).document(17)[12])
    config = replace(CONFIG, vocab_size=int(open_split(folder).tokens.max()) + 1)
    model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        dict(model.named_parameters())["embed.weight"][token] = float("inf")
    hit = next(step for step in range(100) if token in loader.batch(step)[0])
    with pytest.raises(BadBatchError, match=rf"stopped before update {hit + 1}: .*document 17\b"):
        train(
            Run.create(tmp_path / "run", "pretrain", {}), model, causal_lm_loss, lambda step: [loader.batch(step)],
            TrainConfig(steps=100, dtype="float32", num_threads=1), description="test", describe_batch=loader.describe_batch,
        )  # fmt: skip
    record = Run(tmp_path / "run").metrics()[-1]
    assert record["step"] == hit + 1 and len(record["rows"]) == 1 and "document 17 " in record["documents"]
