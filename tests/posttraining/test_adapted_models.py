"""Models with an adapter on them: reward trunks with a head trained whole, and verbs that take a base and an adapter's folder."""

import json
from dataclasses import replace

import pytest
import torch

from cut_short import killed_at
from plinth.cli.main import main
from plinth.cli.serve import ServeConfig, make_app
from plinth.config import UserError
from plinth.models.hub import load_decoder, save_model
from plinth.models.reward import RewardConfig, RewardModel
from plinth.models.tensor_file import TensorFiles
from plinth.posttraining import reward_tuning
from plinth.posttraining.adapted_models import load_adapted, load_adapted_reward, merge_adapter
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.lora import LoraConfig, adapted_modules, add_adapters
from plinth.posttraining.ppo import train_ppo
from plinth.posttraining.ppo_config import CriticConfig, PpoConfig
from plinth.posttraining.reward import load_reward
from plinth.posttraining.reward_tuning import RewardTuning, train_reward
from plinth.posttraining.rollouts import SampleConfig
from plinth.serving.keys import ApiKeys
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from small_models import GROUPED, SUBJECTS, noisy_decoder, subjects_tokenizer

KINDS = {
    "lora": LoraConfig(4, dropout=0.1),
    "dora": LoraConfig(4, rank_stabilised=True, dora=True, targets=("q_proj", "o_proj", "up_proj")),
    "qlora": LoraConfig(4, quantise="nf4", layers=(1,)),
}
ASKED = ["What does seek do?"] * 2, ["It does seek.", "It does copy things."]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a decoder, pairs and prompts."""
    folder, tokenizer = tmp_path_factory.mktemp("base"), subjects_tokenizer()
    save_model(noisy_decoder(replace(GROUPED, vocab_size=tokenizer.vocab_size), noise=0.05), tokenizer, folder / "model")
    names = [(name, other) for step in (1, 2, 3) for name, other in zip(SUBJECTS, SUBJECTS[step:] + SUBJECTS[:step])]
    rows = [{"prompt": f"What does {a} do?", "chosen": f"It does {a}.", "rejected": f"It does {b} things."} for a, b in names]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What does {name} do?"}) + "\n" for name in SUBJECTS))
    return folder


def tuning(adapter, steps=6, **train):
    optimizer = OptimizerConfig(lr=0.02, muon_lr=0.02)
    settings = {"dtype": "float32", "num_threads": 2, "optimizer": optimizer, "warmup_steps": 1, "checkpoint_every_s": 0.0, **train}
    return RewardTuning(TrainConfig(steps=steps, **settings), prompts_per_step=4, micro_batch_size=2, adapter=adapter)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_learns_through_adapters_and_its_head(tmp_path, base, kind):
    run = train_reward(tmp_path / "run", base / "model", base / "pairs.jsonl", tuning(KINDS[kind], 18))
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["loss_nats"] < 0.7 * first["loss_nats"]
    adapted = load_adapter(RewardModel.from_decoder(load_decoder(base / "model"), torch.Generator()), run.path / "adapter")
    assert run.summary["trained_params"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    scores = load_reward(run.path).score(*ASKED)
    assert scores[0] > scores[1] and load_reward(run.path).model.config.bias != 0
    assert load_adapted_reward(base / "model", run.path).score(*ASKED) == pytest.approx(scores, abs=1e-4)
    onto = "dequantised" if kind == "qlora" else None
    merged, count = merge_adapter(base / "model", run.path / "adapter", tmp_path / "merged", onto)
    assert count == run.summary["trained_params"] and load_reward(merged).score(*ASKED) == pytest.approx(scores, abs=1e-4)
    before, after = load_decoder(base / "model").state_dict(), load_reward(run.path).model.trunk.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("layers.1." if kind == "qlora" else "layers.") and name.endswith(".weight") for name in changed)


@pytest.mark.parametrize("shape", ["tied", "output multiplier"])
def test_the_files_of_a_reward_model_are_pefts(tmp_path, shape):
    """What PEFT 0.21 writes for LlamaForSequenceClassification: adapters by their names in the model, and `score` whole."""
    config = GROUPED if shape == "tied" else replace(GROUPED, output_multiplier=0.5)
    model = RewardModel.from_decoder(noisy_decoder(config), torch.Generator().manual_seed(1))
    add_adapters(model.trunk, LoraConfig(4))
    model.config = RewardConfig(model.config.decoder, 0.75)
    for _, module in adapted_modules(model):
        module.lora_b.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
    save_adapter(model, tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (values["task_type"], values["modules_to_save"]) == ("SEQ_CLS", ["score"])
    files = TensorFiles([tmp_path / "adapter" / "adapter_model.safetensors"])
    names = set(files.shapes())
    assert "base_model.model.score.weight" in names and "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight" in names
    assert len(names) == 2 * 14 + 1
    head = model.score.weight.detach() * (1.0 if shape == "tied" else 0.5)
    torch.testing.assert_close(files.read("base_model.model.score.weight"), head)
    # PEFT itself writes both names of heads, and knows nothing of what is added to scores.
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values | {"modules_to_save": ["classifier", "score"]}))
    back = load_adapter(RewardModel.from_decoder(noisy_decoder(config), torch.Generator().manual_seed(7)), tmp_path / "adapter")
    tokens, lengths = torch.arange(20).view(2, 10), torch.tensor([10, 7])
    torch.testing.assert_close(back(tokens, lengths), model(tokens, lengths), rtol=1e-5, atol=1e-5)
    (tmp_path / "adapter" / "reward.json").unlink()
    plain = load_adapter(RewardModel.from_decoder(noisy_decoder(config), torch.Generator()), tmp_path / "adapter")
    torch.testing.assert_close(plain(tokens, lengths) + 0.75, model(tokens, lengths), rtol=1e-5, atol=1e-5)


def test_resume_gives_the_same_bits(tmp_path, base):
    adapter = LoraConfig(4, dora=True, dropout=0.3, lr_ratio=4.0, quantise="nf4")
    config = tuning(adapter, dtype="bfloat16")
    whole = train_reward(tmp_path / "whole", base / "model", base / "pairs.jsonl", config)

    with killed_at(7, reward_tuning, "batch_of"):
        train_reward(tmp_path / "cut", base / "model", base / "pairs.jsonl", config)
    resumed = train_reward(tmp_path / "cut", base / "model", base / "pairs.jsonl", config, resume=True)
    for folder, file in (("adapter", "adapter_model.safetensors"), ("adapter", "reward.json"), ("model", "model.safetensors")):
        assert (whole.path / folder / file).read_bytes() == (resumed.path / folder / file).read_bytes()


def test_ppo_learns_from_it_and_its_critic_starts_from_it(tmp_path, base):
    reward = train_reward(tmp_path / "reward", base / "model", base / "pairs.jsonl", tuning(LoraConfig(2)))
    train = TrainConfig(steps=2, dtype="float32", num_threads=2, optimizer=OptimizerConfig(name="adamw", lr=0.01))
    config = PpoConfig(
        train, SampleConfig(group_size=1, max_tokens=4), prompts_per_rollout=8, epochs=1, minibatches=2, micro_batch_size=4,
        adapter=LoraConfig(2, lr_ratio=2.0), critic=CriticConfig(start=reward.path),
    )  # fmt: skip
    run = train_ppo(tmp_path / "ppo", base / "model", str(reward.path), base / "prompts.jsonl", config)
    assert run.summary["steps"] == 2 and (run.path / "adapter" / "adapter_model.safetensors").exists()


def test_the_command_line_trains_merges_and_scores(tmp_path, base, capsys):
    options = "--train.steps 2 --train.dtype float32 --train.num-threads 2 --adapter.rank 2 --adapter.targets q_proj --json"
    run = ["reward", str(base / "model"), "--data", str(base / "pairs.jsonl"), "--out", str(tmp_path / "run")]
    assert main([*run, *options.split()]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["trained_params"] == 2 * 2 * (32 + 32) + 32
    assert main(["merge", str(base / "model"), str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert "Next: plinth reward score" in capsys.readouterr().out
    scores = []
    for place in ([str(tmp_path / "run")], [str(tmp_path / "merged")], [str(base / "model"), "--adapter", str(tmp_path / "run")]):
        assert main(["reward", "score", *place, "--data", str(base / "pairs.jsonl"), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out)["scores"]["mean"])
    assert scores[1:] == pytest.approx([scores[0]] * 2, abs=1e-5)
    assert main(["generate", str(base / "model"), "--adapter", str(tmp_path / "run"), "-p", "What"]) == 1
    assert "makes a reward model of" in capsys.readouterr().err


@pytest.fixture(scope="module", params=[None, "nf4"])
def tuned(request, base, tmp_path_factory):
    """A folder with an adapter of a decoder that changes what it writes, and the decoder with it merged."""
    folder, model = tmp_path_factory.mktemp("tuned"), load_decoder(base / "model")
    add_adapters(model, LoraConfig(4, quantise=request.param))
    for _, module in adapted_modules(model):
        module.lora_b.data.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(2))
    save_adapter(model, folder / "adapter")
    merge_adapter(base / "model", folder, folder / "merged", request.param and "dequantised")
    return folder


def test_generate_takes_a_base_and_an_adapter(base, tuned, capsys):
    written = []
    for place in ([str(base / "model")], [str(tuned / "merged")], [str(base / "model"), "--adapter", str(tuned)]):
        options = ["-p", "What does", "--max-tokens", "12", "--temperature", "0", "--weights", "fp32", "--json"]
        assert main(["generate", *place, *options]) == 0
        written.append([token["id"] for token in json.loads(capsys.readouterr().out)["completions"][0]["tokens"]])
    assert written[1] == written[2] != written[0]


@pytest.mark.parametrize("tuned", [None], indirect=True)
def test_a_server_takes_a_base_and_an_adapter(tmp_path, base, tuned):
    provenance = tmp_path / "run" / "provenance.json"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(base / "model")
    provenance.write_text('{"stage": "pretrain"}')
    config = ServeConfig(tmp_path / "run", weights="fp32", answer_cache=tmp_path / "answers.sqlite")
    facts = []
    for adapter in (None, tuned / "adapter"):
        app, found = make_app(replace(config, adapter=adapter), tmp_path / "run" / "model", ApiKeys(()))
        app.state.server.batcher.close()
        facts.append(found)
    assert [found["chat"] for found in facts] == [False, True]


@pytest.mark.parametrize("tuned", [None], indirect=True)
def test_what_does_not_fit_is_said(tmp_path, base, tuned, capsys):
    assert main(["generate", str(tuned / "adapter"), "-p", "What"]) == 1
    assert f"holds an adapter and no model. Name the model that it belongs to: `plinth generate MODEL --adapter {tuned}" in (
        capsys.readouterr().err
    )
    with pytest.raises(UserError, match="has no head of a reward model"):
        load_adapted_reward(base / "model", tuned)
    model = RewardModel.from_decoder(load_decoder(base / "model"), torch.Generator())
    with pytest.raises(UserError, match="score.weight is absent, but this model needs"):
        load_adapter(model, tuned / "adapter")
    add_adapters(model.trunk, LoraConfig(4))
    save_adapter(model, tmp_path / "reward")
    with pytest.raises(UserError, match="holds the head of a reward model, and this model is none"):
        load_adapter(load_decoder(base / "model"), tmp_path / "reward")
    assert isinstance(load_adapted(base / "model", tmp_path / "reward")[0], RewardModel)
