"""`plinth plan --gpus N --model NAME` through the command line: text, JSON, a config.json of one's own, mistakes in one line."""

import json

import pytest

from plinth.cli.main import main


def test_text_shows_the_layout_its_memory_its_step_and_the_reasons(capsys):
    assert main(["plan", "--gpus", "64", "--model", "llama-3-8b"]) == 0
    shown = capsys.readouterr().out
    for words in ("Plan for llama-3-8b on 64 x NVIDIA H100", "--parallel.dp-shard", "Memory of an accelerator", "A step", "Runners-up",
                  "Why this layout", "MFU", "Where the numbers come from"):  # fmt: skip
        assert words in shown


def test_json_and_file_hold_the_same_plan_and_its_parts_add_up(tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", "--gpus=256", "--model=llama-3-70b", "--json", "--out", str(out), "--price-per-gpu-hour", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == json.loads(out.read_text())
    step, memory = plan["chosen"]["step"], plan["chosen"]["memory"]
    parts = ("products_s", "recomputed_s", "passes_s", "optimizer_s", "bubble_s", "exposed_s")
    assert step["total_s"] == pytest.approx(sum(step[name] for name in parts)) == pytest.approx(plan["predicted"]["step_s"])
    assert step["exposed_s"] == pytest.approx(sum(each["exposed_s"] for each in step["transfers"]))
    items = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    assert memory["used"] == sum(memory[name] for name in items) and memory["total"] == memory["used"] + memory["margin"]
    assert len(plan["alternatives"]) == 5 and plan["predicted"]["cost"] > 0 and plan["predicted"]["co2_kg"] is None


def test_a_config_json_is_planned_as_the_model_that_it_describes(tmp_path, capsys):
    values = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 8, "intermediate_size": 14336, "max_position_embeddings": 131072}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    steps = []
    for model in (str(tmp_path), str(tmp_path / "config.json"), "llama-3-8b"):
        assert main(["plan", "--gpus", "8", "--model", model, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        steps.append((plan["num_params"], plan["seq_len"], plan["predicted"]["step_s"]))
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "8"], "needs --model, for instance --model llama-3-70b"),
        (["--model", "llama-3-8b"], "needs --gpus, for instance --gpus 1024"),
        (["--gpus", "8", "--model", "llama-3-9b"], "Nearest: llama-3-8b"),
        (["--gpus", "8", "--model", "absent.json"], "absent.json does not exist"),
    ],
)
def test_mistakes_take_one_line(capsys, argv, message):
    assert main(["plan", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_help_of_the_plan_for_a_machine_names_the_one_for_a_cluster(capsys):
    for argv, words in (
        (["plan", "--help"], "plinth plan --gpus 1024 --model llama-3-70b"),
        (["plan", "--gpus", "8", "--help"], "--gpus-per-node"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0 and words in " ".join(capsys.readouterr().out.split())
