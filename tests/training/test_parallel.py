"""Many processes train like one: loss curves, weights, memory, errors. Real process groups (gloo) of 2 and 4 processes."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plinth.config import UserError
from plinth.data.curate import CurateConfig, curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_model
from plinth.models.transformer import Transformer
from plinth.recipes.pretraining import pretrain
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss
from plinth.training.parallel import ParallelConfig, balanced
from plinth.training.sharding import block_of, checkpoint_blocks, chunk, fused_name, part_name

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from ranks_session import PRETRAINING  # noqa: E402

SAME_LOSS = 1e-5  # relative; measured differences are some 1e-7, the order of additions in fp32
SAME_WEIGHTS = 1e-4  # relative to a tensor's largest entry, after 5 updates; Newton-Schulz magnifies small singular values


GROUPS = {
    "two": "2:check_layouts,check_bf16,check_errors",
    "four": "4:check_layouts",
    "failure": "2:check_failure",
    "death": "2:check_death",
    "start": "4:check_start_on_four",
    "resume": "2:check_resume_on_two",
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Run all groups of processes; return the folder with what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    pack_stories(folder)
    command = [sys.executable, "-W", "ignore", HERE / "ranks_session.py", folder, *GROUPS.values()]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1] / "src")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return folder


def pack_stories(folder):
    (folder / "texts").mkdir()
    for i in range(30):
        lines = [f"{i * n} times the cat number {n} met {i + n} friends at the {('barn', 'wood', 'lake')[n % 3]}." for n in range(12)]
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines) + "\n")
    documents = read_documents([folder / "texts"])
    curate(documents, folder / "corpus", CurateConfig(near_duplicate_threshold=None, heldout_fraction=0.1, skip_rules=("repeated_ngrams",)))
    tokenizer = train_tokenizer(documents.table["text"].to_pylist(), 300)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    pack_corpus(folder / "corpus", tokenizer, folder / "shards")


def codes_and_errors(folder, group):
    count, names = GROUPS[group].split(":")
    errors = [(folder / f"{names}.{rank}.err").read_text() for rank in range(int(count))]
    return json.loads((folder / f"{names}.codes.json").read_text()), errors


@pytest.fixture(params=["two", "four"])
def found(request, session):
    return results(session, request.param)


@pytest.fixture
def two(session):
    return results(session, "two")


def results(session, group):
    codes, errors = codes_and_errors(session, group)
    assert not any(codes), "\n".join(errors)
    return json.loads((session / f"{GROUPS[group].split(':')[1]}.json").read_text())


def entries(found):
    assert len(found["entries"]) >= 6
    return found["entries"]


@pytest.mark.slow
def test_loss_curves_and_weights_are_those_of_one_process(found):
    for entry in entries(found):
        for (loss, norm), (one_loss, one_norm) in zip(entry["curve"], entry["whole"]["curve"], strict=True):
            assert loss == pytest.approx(one_loss, rel=SAME_LOSS), entry["layout"]
            assert norm == pytest.approx(one_norm, rel=10 * SAME_LOSS), entry["layout"]
        assert entry["whole"]["weights_apart"] < SAME_WEIGHTS, entry["layout"]
        assert entry["curve"][-1][0] < entry["curve"][0][0]  # it learns something that could differ


@pytest.mark.slow
def test_the_copies_of_the_weights_hold_equal_bits(found):
    assert all(entry["equal_copies"] for entry in entries(found))


@pytest.mark.slow
def test_memory_a_rank_falls_with_shards_and_tensor_parallelism(found):
    for entry in entries(found):
        layout = {"dp_replicate": 1, "dp_shard": 1, "tp": 1} | entry["layout"]
        cut = layout["dp_shard"] * layout["tp"]
        for kind in (0, 1):  # weights, optimizer state
            held, whole = [rank[kind] for rank in entry["held"]], entry["whole"]["held"][kind]
            replicated = 0 if entry["shape"] == "tied" else 4 * (1 + kind) * (2 * 2 * (24 + 8) + 24)  # scales, whole on each tp rank
            assert sum(held) == layout["dp_replicate"] * (whole + (layout["tp"] - 1) * replicated)
            assert max(held) < 1.25 * whole / cut  # an uneven last piece at this tiny size
            assert cut > 1 or max(held) == whole


@pytest.mark.slow
def test_bf16_computes_on_fp32_shards(two):
    assert two["master_dtypes"] == ["torch.float32"]
    pairs = list(zip(two["bf16"]["float32"], two["bf16"]["bfloat16"], strict=True))
    assert all(a[0] == pytest.approx(b[0], rel=0.02) for a, b in pairs)
    assert any(a[0] != b[0] for a, b in pairs)


@pytest.mark.slow
def test_refusals_name_the_fields(two):
    degrees, heads, rows, normuon = two["errors"]
    assert "parallel.dp_shard=3" in degrees and "WORLD_SIZE=2" in degrees and "torchrun --nproc-per-node 3" in degrees
    assert "model.num_kv_heads=1 is not a multiple of parallel.tp=2" in heads
    assert "sequences_per_step=7" in rows and "Use 6" in rows
    assert "normuon_beta2=0.9" in normuon


@pytest.mark.slow
@pytest.mark.parametrize(("group", "line"), [("failure", "rank 1: rank one met a mistake."), ("death", "rank 0 lost contact")])
def test_an_error_on_one_rank_ends_all_with_one_line(group, line, session):
    codes, errors = codes_and_errors(session, group)
    assert all(codes)
    said = [text for error in errors for text in error.splitlines() if text.startswith("plinth:")]
    assert len(said) == 1 and line in said[0]
    assert not any("Traceback" in error for error in errors)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks_on_the_same_curve(session):
    started, resumed = results(session, "start"), results(session, "resume")
    assert [len([name for name in found["files"] if name.endswith(".distcp")]) for found in (started, resumed)] == [4, 2]
    config = replace(PRETRAINING, parallel=ParallelConfig())
    paths = (session / "shards", session / "tokenizer", config)
    alone = pretrain(session / "alone", *paths)
    told = []
    run = session / "run"
    (run / "DONE").unlink()
    for step in (7, 8):  # what two ranks saved at step 6 is the newest
        shutil.rmtree(run / "checkpoints" / f"step_{step:06d}", ignore_errors=True)
    again = pretrain(run, *paths, resume=True, warn=told.append)
    for metrics in (started["metrics"], resumed["metrics"], again.metrics()):
        assert [line["step"] for line in metrics] == list(range(1, 9))
        for line, expected in zip(metrics, alone.metrics(), strict=True):
            assert line["loss_nats"] == pytest.approx(expected["loss_nats"], rel=SAME_LOSS)
            assert line["tokens"] == expected["tokens"]
    weights, whole = load_model(again.model_dir).state_dict(), load_model(alone.model_dir).state_dict()
    assert all(float((weights[name] - whole[name]).abs().max()) < SAME_WEIGHTS for name in whole)


@pytest.mark.slow
def test_a_damaged_file_of_one_rank_is_named_and_the_checkpoint_before_is_taken(session):
    results(session, "resume")
    _, errors = codes_and_errors(session, "resume")
    assert "step_000005/__1_0.distcp is damaged" in errors[0] and "Falling back to step 4" in errors[0]
    assert "damaged" not in errors[1]


def test_degrees_fill_in_the_shards():
    assert ParallelConfig().degrees(8) == (1, 8, 1)
    assert ParallelConfig(dp_replicate=2, tp=2).degrees(8) == (2, 2, 2)
    assert ParallelConfig().degrees(1) == (1, 1, 1)
    with pytest.raises(UserError, match="parallel.tp=4 = 8 processes, but WORLD_SIZE=1"):
        ParallelConfig(dp_replicate=2, tp=4).degrees(1)
    with pytest.raises(UserError, match="parallel.tp=0 must be at least 1"):
        ParallelConfig(tp=0)


@pytest.mark.parametrize(("size", "parts"), [(12, 4), (50, 4), (3, 4), (1, 2), (0, 2)])
def test_pieces_are_those_of_torch(size, parts):
    expected = [len(piece) for piece in torch.arange(size).chunk(parts)] if size else [0]
    found = [stop - start for start, stop in (chunk(size, parts, i) for i in range(parts))]
    assert found == expected + [0] * (parts - len(expected))


@pytest.mark.parametrize("name", ["embed.weight", "layers.0.attention.out.weight", "layers.1.mlp.gate_up.parts.1", "final_norm.weight"])
@pytest.mark.parametrize(("shards", "tp"), [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_blocks_of_a_copy_cover_the_whole_once(name, shards, tp):
    shape = torch.Size((10,) if "norm" in name else (10, 6))
    times = torch.zeros(shape)
    for member in range(shards * tp):
        times[block_of(name, shape, shards, tp, member)] += 1
    assert times.min() == times.max() == (tp if "norm" in name else 1)  # a scale is whole on each tensor-parallel rank


def test_names_of_parts_go_and_come_back():
    assert part_name("layers.0.mlp.gate_up.weight", 1) == "layers.0.mlp.gate_up.parts.1"
    assert fused_name("layers.0.mlp.gate_up.parts.1") == ("layers.0.mlp.gate_up.weight", 1)
    assert fused_name("embed.weight") == ("embed.weight", None)


def test_work_is_dealt_evenly():
    costs = {f"m{i}": float(cost) for i, cost in enumerate([9, 7, 6, 5, 4, 3, 2])}
    owners = balanced(costs, 3)
    assert sorted(name for names in owners for name in names) == sorted(costs)
    assert max(sum(costs[name] for name in names) for names in owners) == 13  # at most 4/3 of the best, 12


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(mode):
    config = DecoderConfig(vocab_size=50, hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=64)
    tokens = torch.randint(50, (2, 65), generator=torch.Generator().manual_seed(0))
    found, kept_bytes = {}, {}
    for each in ("none", "block", "selective"):
        model = Transformer(config).init_weights(torch.Generator().manual_seed(0))
        checkpoint_blocks(model, each)
        kept: dict[int, int] = {}

        def note(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss, _, _ = causal_lm_loss(model, (tokens[:, :-1], tokens[:, 1:]))
        found[each] = torch.autograd.grad(loss, list(model.parameters()))
        kept_bytes[each] = sum(kept.values())
    assert all(torch.equal(a, b) for a, b in zip(found["none"], found[mode], strict=True))
    assert kept_bytes["block"] < 0.7 * kept_bytes["none"]
