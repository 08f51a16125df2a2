"""What is in a checkpoint, what is refused, which are kept, and what happens when the disk refuses."""

import json
import os
import random
import resource
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import plinth.training.saving
from plinth.config import UserError
from plinth.run import Run
from plinth.training.checkpoint import RECORD_FILE, SEAL_FILE, STATE_FILE, read_checkpoint
from plinth.training.loop import Stopped
from plinth.training.objectives import causal_lm_loss
from training.test_loop import CONFIG, STEPS, Killed, batches_at, killed_at, make_config, run_training


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def steps_kept(path):
    return [step for step, _ in Run(path).checkpoints()]


# --- what is kept


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run_training(tmp_path / "run", config=make_config(keep_checkpoints=2))
    assert steps_kept(tmp_path / "run") == [6, 7]


def test_checkpoints_before_the_decay_at_multiples_and_at_the_end_are_kept_for_good(tmp_path):
    config = make_config(checkpoint_every_s=1e9, keep_checkpoints=1, decay_fraction=0.5)
    run_training(tmp_path / "decay", config=replace(config, keep_pre_decay=True))
    run_training(tmp_path / "every", config=replace(config, keep_every_steps=3, keep_final=True))
    run_training(tmp_path / "none", config=config)
    run_training(tmp_path / "constant", config=replace(config, decay_fraction=0.0, keep_pre_decay=True))
    kept = [steps_kept(tmp_path / name) for name in ("decay", "every", "none", "constant")]
    assert kept == [[4], [3, 6, 8], [], []]
    assert config.lr_scale(3) == 1.0 > config.lr_scale(4)


def test_many_saves_keep_the_ones_for_good_and_the_newest(tmp_path):
    config = make_config(keep_checkpoints=1, decay_fraction=0.5, keep_pre_decay=True, keep_every_steps=3)
    run_training(tmp_path / "run", config=config)
    assert steps_kept(tmp_path / "run") == [3, 4, 6, 7]


def test_checkpoints_are_ordered_by_number(tmp_path):
    run = Run.create(tmp_path / "run", "pretrain", {})
    for name in ("step_999999", "step_1000000", "step_000002", ".step_000003.abcdefgh", "damaged_step_000004", "step_best"):
        (run.checkpoints_dir / name).mkdir(parents=True)
    assert [step for step, _ in run.checkpoints()] == [2, 999999, 1000000] and run.last_step == 1000000


# --- state is everything


class Average:
    """A running average of the losses seen: a part with a tensor and a number of its own."""

    def __init__(self):
        self.mean, self.count = torch.zeros(2), 0

    def state_dict(self):
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state):
        self.mean, self.count = state["mean"], state["count"]


def test_generators_and_further_parts_come_back(tmp_path):
    """Batches that draw from every generator there is: only a full restore gives the same ones after a kill."""

    def run(path, killed=None, resume=False):
        given, average = torch.Generator().manual_seed(5), Average()
        if not resume:
            torch.manual_seed(1), np.random.seed(2), random.seed(3)

        def batches(step):
            if step == killed:
                raise Killed
            drawn = [torch.rand(()), torch.rand((), generator=given), torch.tensor(np.random.rand()), torch.tensor(random.random())]
            tokens = torch.stack([(batches_at(step)[0][0] * (1 + value)).long() % 40 for value in drawn])
            average.mean, average.count = average.mean * 0.9 + tokens[0, 0, :2], average.count + 1
            return [(part[:, :-1], part[:, 1:]) for part in tokens]

        _, weights, _ = run_training(path, resume=resume, batches=batches, generators={"given": given}, extra_state={"average": average})
        return weights, average

    whole, average = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", killed=5)
    torch.manual_seed(9), np.random.seed(9), random.seed(9)
    resumed, again = run(tmp_path / "cut", resume=True)
    assert same(whole, resumed)
    assert again.count == average.count == STEPS and torch.equal(again.mean, average.mean)


def test_a_checkpoint_holds_global_quantities(tmp_path):
    """No entry is of a rank or a thread, so the same file serves any number of them; the step is the loader's cursor."""
    run_training(tmp_path / "run", config=make_config(), data={"shards_sha256": "ab", "seq_len": 12})
    record, tensors = read_checkpoint(Run(tmp_path / "run").checkpoints()[2][1])
    assert record["step"] == record["num_updates"] == 3 and record["tokens"] == 3 * 4 * 12 and record["time_s"] > 0
    assert record["data"] == {"shards_sha256": "ab", "seq_len": 12}
    assert {name.split("/")[0] for name in tensors} == {"weight", "optimizer", "generator"}


def test_resuming_with_other_data_is_refused(tmp_path):
    data = {"shards_sha256": "ab" * 32, "seq_len": 12, "kind_weights": {"code": 1.0}}
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(3), data=data)
    with pytest.raises(UserError, match="seq_len=13 differs from 12, with which .*cut was trained"):
        run_training(tmp_path / "cut", resume=True, data={**data, "seq_len": 13})
    (tmp_path / "cut" / "checkpoints" / "data.json").unlink()
    with pytest.raises(UserError, match="seq_len=13 differs from 12, with which .*step_000003 was trained"):
        run_training(tmp_path / "cut", resume=True, data={**data, "seq_len": 13})
    assert run_training(tmp_path / "cut", resume=True, data=data)[2]["steps"] == STEPS


def test_other_data_are_refused_before_the_first_checkpoint_too(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(0), data={"seed": 1})
    with pytest.raises(UserError, match="seed=2 differs from 1"):
        run_training(tmp_path / "cut", resume=True, data={"seed": 2})


def test_another_model_and_other_parts_are_refused(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(3))
    with pytest.raises(UserError, match=r"step_000003 is of another model or optimizer: .*\(48, 32\)"):
        run_training(tmp_path / "cut", resume=True, shape=replace(CONFIG, vocab_size=48))
    with pytest.raises(UserError, match="do not both have the part average"):
        run_training(tmp_path / "cut", resume=True, extra_state={"average": Average()})


def test_another_machine_is_named(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(3))
    folder = Run(tmp_path / "cut").checkpoints()[-1][1]
    record = json.loads((folder / RECORD_FILE).read_text())
    record["made_on"]["cpu"] = "Another"
    (folder / RECORD_FILE).write_text(json.dumps(record))
    plinth.training.checkpoint.seal(folder)
    told = []
    run_training(tmp_path / "cut", resume=True, warn=told.append)
    assert len(told) == 1 and "cpu Another is" in told[0] and "last bits may differ" in told[0]


# --- damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES = {"flip": flip, "cut": cut, "empty": lambda file: file.write_bytes(b""), "missing": lambda file: file.unlink()}


@pytest.mark.parametrize("name", [STATE_FILE, RECORD_FILE, SEAL_FILE])
@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, damage, name):
    _, whole, _ = run_training(tmp_path / "whole", config=make_config(checkpoint_every_s=1e9))
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(5))
    assert steps_kept(tmp_path / "cut")[-1] == 5
    DAMAGES[damage](tmp_path / "cut" / "checkpoints" / "step_000005" / name)
    told = []
    run, resumed, _ = run_training(tmp_path / "cut", resume=True, warn=told.append)
    assert len(told) == 1 and "step_000005" in told[0] and "Set aside as damaged_step_000005. Falling back to step 4." in told[0]
    assert (run.checkpoints_dir / "damaged_step_000005").exists()
    assert same(whole, resumed)
    assert [r["step"] for r in run.metrics()] == list(range(1, STEPS + 1))


def test_no_sound_checkpoint_is_an_error(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(2))
    for _, checkpoint in Run(tmp_path / "cut").checkpoints():
        (checkpoint / STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match="no sound checkpoint is left"):
        run_training(tmp_path / "cut", resume=True)


@pytest.mark.parametrize(("ending", "lost"), [('{"step": 5, "loss', 1), ("", 3), (None, 5)])
def test_truncated_metrics_do_not_hinder_a_resume(tmp_path, ending, lost):
    """The numbers that count come from the checkpoint; lines that are lost are counted, and none appears twice."""
    _, whole, summary = run_training(tmp_path / "whole")
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(5))
    file = tmp_path / "cut" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    if ending is None:
        file.unlink()
    else:
        file.write_text("".join(lines[: 5 - lost]) + ending)
    told = []
    run, resumed, again = run_training(tmp_path / "cut", resume=True, warn=told.append)
    assert told == [f"{file} has lost {lost} of the 5 steps before the checkpoint."]
    assert [r["step"] for r in run.metrics()] == [*range(1, 6 - lost), 6, 7, 8]
    assert same(whole, resumed) and again["tokens"] == summary["tokens"]


def test_what_a_killed_process_left_half_done_is_cleared_away(tmp_path):
    with pytest.raises(Killed):
        run_training(tmp_path / "cut", batches=killed_at(3))
    half = tmp_path / "cut" / "checkpoints" / ".step_000004.abc_1234"
    half.mkdir()
    (half / STATE_FILE).write_bytes(b"half")
    (tmp_path / "cut" / ".model.abcdefgh").mkdir()
    (tmp_path / "cut" / ".metrics.jsonl.abcdefgh").write_text("half")
    (tmp_path / "cut" / ".mine").write_text("the user's own")
    run_training(tmp_path / "cut", resume=True)
    assert [p.name for p in (tmp_path / "cut").rglob(".*")] == [".mine"]


def test_two_processes_do_not_train_one_run(tmp_path):
    def batches(step):
        with pytest.raises(UserError, match="is being written by another process"):
            run_training(tmp_path / "run", resume=True)
        return batches_at(step)

    run_training(tmp_path / "run", batches=batches)
    with Run(tmp_path / "run").lock():  # free again
        pass


# --- saving in the background


def test_the_background_writes_the_state_of_its_step_while_training_goes_on(tmp_path, monkeypatch):
    """The writer is held back until training is two steps further; its file equals that of a run that waited for it."""
    further, write = threading.Event(), plinth.training.saving.write_checkpoint

    def batches(step):
        if step == 5:
            further.set()
        return batches_at(step)

    def slow_write(folder, snapshot):
        assert further.wait(60)
        write(folder, snapshot)

    config = make_config(checkpoint_every_s=1e9, keep_every_steps=3)
    torch.manual_seed(0)
    run_training(tmp_path / "waiting", config=replace(config, keep_every_steps=1))
    torch.manual_seed(0)
    monkeypatch.setattr(plinth.training.saving, "write_checkpoint", slow_write)
    run_training(tmp_path / "run", batches=batches, config=replace(config, background_saves=True))
    for name in ("step_000003", "step_000006"):
        one, other = (tmp_path / run / "checkpoints" / name / STATE_FILE for run in ("waiting", "run"))
        assert one.read_bytes() == other.read_bytes()


def test_one_save_at_a_time(tmp_path, monkeypatch):
    """While one is being written, a due one is not begun: with a slow disk fewer are taken, and training does not wait."""
    further, write = threading.Event(), plinth.training.saving.write_checkpoint

    def slow_write(folder, snapshot):
        assert further.wait(60)
        write(folder, snapshot)

    def batches(step):
        if step == STEPS - 1:
            further.set()
        return batches_at(step)

    monkeypatch.setattr(plinth.training.saving, "write_checkpoint", slow_write)
    run_training(tmp_path / "run", batches=batches, config=make_config(background_saves=True))
    assert steps_kept(tmp_path / "run")[:1] == [1] and len(steps_kept(tmp_path / "run")) <= 2


# --- a disk that refuses


@pytest.fixture
def file_size():
    """Sets the largest size of a written file in bytes; the system refuses more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("background", [False, True])
def test_training_goes_on_when_the_disk_is_full_and_saves_again_when_it_can(tmp_path, file_size, background):
    def batches(step):
        file_size(20_000 if 3 <= step < 6 else None)
        return batches_at(step)

    told = []
    config = make_config(checkpoint_every_s=1e9, keep_every_steps=1, background_saves=background)
    run, weights, _ = run_training(tmp_path / "full", batches=batches, config=config, warn=told.append)
    refused = sorted(set(range(1, STEPS + 1)) - set(steps_kept(run.path)))
    # in the background, 3 may still be being written when the disk is full, and 6 when it no longer is
    assert {4, 5} <= set(refused) <= {3, 4, 5, 6} and (background or refused == [4, 5, 6])
    assert len(told) == len(refused)
    for text, step in zip(told, refused):
        assert f"the checkpoint of step {step} was not written" in text and "File too large" in text and "Training goes on" in text
    for _, path in run.checkpoints():
        read_checkpoint(path)
    assert not list(run.checkpoints_dir.glob(".*"))
    assert same(weights, run_training(tmp_path / "whole")[1])


def test_metrics_that_do_not_fit_are_written_later_each_once(tmp_path, file_size):
    def batches(step):
        file_size((tmp_path / "full" / "metrics.jsonl").stat().st_size + 100 if 3 <= step < 6 else None)
        return batches_at(step)

    told = []
    config = make_config(checkpoint_every_s=1e9, keep_every_steps=1)
    run, _, _ = run_training(tmp_path / "full", batches=batches, config=config, warn=told.append)
    assert [r["step"] for r in run.metrics()] == list(range(1, STEPS + 1))
    assert "metrics.jsonl: File too large" in told[0]
    assert steps_kept(run.path) == [1, 2, 3, 7, 8]  # none without its metrics


def test_a_stop_that_cannot_save_says_so(tmp_path, file_size):
    def batches(step):
        if step == 4:
            file_size(20_000)
            os.kill(os.getpid(), signal.SIGTERM)
        return batches_at(step)

    config = make_config(checkpoint_every_s=1e9, keep_every_steps=2)
    with pytest.raises(UserError, match="stopped after step 5, but the checkpoint of step 5 was not written .*of step 4") as refused:
        run_training(tmp_path / "cut", batches=batches, config=config)
    assert not isinstance(refused.value, Stopped) and refused.value.exit_code == 1
    file_size(None)
    assert same(run_training(tmp_path / "cut", resume=True)[1], run_training(tmp_path / "whole")[1])


def test_a_mistake_of_ours_in_the_writer_is_raised(tmp_path):
    class Unserialisable:
        def state_dict(self):
            return {"value": object()}

    with pytest.raises(TypeError, match="not JSON serializable"):
        run_training(
            tmp_path / "run", loss=causal_lm_loss, extra_state={"bad": Unserialisable()}, config=make_config(background_saves=True)
        )
