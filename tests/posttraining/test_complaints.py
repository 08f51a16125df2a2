"""What users of other trainers complain about and no other file of tests covers: memory, seeds, resuming, the CPU, imports.

docs/complaints.md lists all fifteen classes with the test of each.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from plinth.cli.main import VERBS, main
from plinth.inference.engine import Engine
from plinth.inference.sampling import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, load_model, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.adapter_files import load_adapter, save_adapter
from plinth.posttraining.completion_scores import completion_log_probs
from plinth.posttraining.distillation import DistillConfig, distill_loss
from plinth.posttraining.log_probs import sequence_log_probs
from plinth.posttraining.lora import LoraConfig, add_adapters, merge
from plinth.run import Run
from plinth.tasks import reviews
from plinth.tokenizer.train import train_tokenizer
from plinth.training.objectives import causal_lm_loss

SHAPE = DecoderConfig(
    vocab_size=300, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64, max_seq_len=128
)
WORDS = ("copy", "move", "read", "seek", "open", "shut", "list", "find")


def decoder(shape: DecoderConfig, seed: int = 0) -> Transformer:
    model = Transformer(shape).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():  # matrices that start at 0 would hide what is learnt
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + 1)))
    return model


# --- class 2: out of memory, because of the logits ---


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most that was allocated at once beyond what was there before, by PyTorch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def gradients(model: Transformer, loss: torch.Tensor) -> None:
    torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


LARGE = DecoderConfig(
    vocab_size=4096, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64, max_seq_len=256
)
TOKENS = torch.randint(0, LARGE.vocab_size, (2, 257), generator=torch.Generator().manual_seed(0))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
LOGITS_BYTES = INPUTS.numel() * LARGE.vocab_size * 4
ROWS = {
    "prompts": TOKENS[:, :1], "prompt_tokens": torch.ones(2, dtype=torch.int64), "completions": TARGETS,
    "mask": torch.ones(2, 256, dtype=torch.bool),
}  # fmt: skip
TEACHER = decoder(LARGE, seed=3)
LOSSES = {
    "sft": lambda model: causal_lm_loss(model, (INPUTS, TARGETS))[0],
    "sft by dft": lambda model: causal_lm_loss(model, (INPUTS, TARGETS), dynamic=True)[0],
    "prefer": lambda model: torch.sigmoid(sequence_log_probs(model, INPUTS, TARGETS)).sum(),
    "distill": lambda model: distill_loss(model, TEACHER, (INPUTS, TARGETS), DistillConfig())[0],
    "policy gradients": lambda model: completion_log_probs(model, ROWS, entropy=True).log_probs_BT.sum(),
}


def test_the_measure_sees_logits_where_they_are():
    model = decoder(LARGE)

    def plain():
        logits = model.logits(model(INPUTS)).flatten(0, 1)
        gradients(model, torch.nn.functional.cross_entropy(logits, TARGETS.flatten()))

    assert peak_bytes(plain) > 2 * LOGITS_BYTES


@pytest.mark.parametrize("method", LOSSES)
def test_the_peak_is_not_the_logits_trl_3678_ms_swift_9991(method, monkeypatch):
    """Every token of every answer counts, the worst case. Beyond what the blocks take, some chunks are held, however many tokens come."""
    for module in ("ops.loss", "posttraining.distill_losses"):
        monkeypatch.setattr(f"plinth.{module}.CHUNK_ELEMENTS", 1 << 17)
    monkeypatch.setattr("plinth.ops.loss.KEPT_ELEMENTS", 1 << 19)  # what is kept for the gradient is bounded too
    model = decoder(LARGE)
    blocks = peak_bytes(lambda: gradients(model, model(INPUTS).sum()))
    assert peak_bytes(lambda: gradients(model, LOSSES[method](model))) < blocks + LOGITS_BYTES / 2


# --- classes 10, 13 and 14: seeds, resuming, and a machine without a GPU, for every method alike ---


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, another one as its teacher, and a file for each kind of data."""
    folder = tmp_path_factory.mktemp("complaints")
    texts = [f"What does {word} do? It does {word} things, well or badly." for word in WORDS] * 3
    tokenizer = train_tokenizer(texts, 300)
    shape = DecoderConfig(**{**SHAPE.__dict__, "vocab_size": tokenizer.vocab_size})
    for name, seed in (("model", 0), ("teacher", 5)):
        save_model(decoder(shape, seed), tokenizer, folder / name)
    prompts = [f"What does {word} do?" for word in WORDS]
    chosen, rejected = ([f"It does {word} {how}." for word in WORDS] for how in ("well", "badly"))
    kinds = {
        "messages": [
            {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c in zip(prompts, chosen)
        ],
        "preference": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in zip(prompts, chosen, rejected)],
        "verifiable": [{"prompt": p, "ground_truth": c} for p, c in zip(prompts, chosen)],
        "prompts": [{"prompt": prompt} for prompt in reviews.prompts()[:8]],
        "unpaired": [
            {"prompt": p, "completion": text, "label": label}
            for label, texts in ((True, chosen), (False, rejected)) for p, text in zip(prompts, texts)
        ],
    }  # fmt: skip
    for kind, rows in kinds.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# method → (verb, what its data are called and are, batch options, more options)
METHODS = {
    "sft": ("sft", "--messages", "messages", ["--conversations-per-step", "4", "--micro-batch-size", "2"], []),
    "sft, LoRA": (
        "sft", "--messages", "messages", ["--conversations-per-step", "4", "--micro-batch-size", "2"],
        ["--adapter.rank", "2", "--adapter.dora"],
    ),
    "sft, QLoRA": (
        "sft", "--messages", "messages", ["--conversations-per-step", "4", "--micro-batch-size", "2"],
        ["--adapter.rank", "2", "--adapter.quantise", "nf4"],
    ),
    "prefer": ("prefer", "--data", "preference", ["--pairs-per-step", "4", "--micro-batch-size", "2"], []),
    "prefer, QLoRA": (
        "prefer", "--data", "preference", ["--pairs-per-step", "4", "--micro-batch-size", "2"],
        ["--adapter.rank", "2", "--adapter.quantise", "nf4"],
    ),
    "prefer, unpaired": ("prefer", "--data", "unpaired", ["--pairs-per-step", "4", "--micro-batch-size", "2"], ["--loss", "kto"]),
    "reward": ("reward", "--data", "preference", ["--prompts-per-step", "4", "--micro-batch-size", "2"], ["--held-out-share", "0"]),
    "distill": ("distill", "--data", "messages", ["--examples-per-step", "4", "--micro-batch-size", "2"], []),
    "distill, on-policy": (
        "distill", "--data", "messages", ["--examples-per-step", "4", "--micro-batch-size", "2"],
        ["--on-policy-share", "0.5", "--max-tokens", "4"],
    ),
    "ppo": (
        "ppo", "--data", "prompts", ["--completions", "16", "--prompts-per-rollout", "8", "--minibatches", "2", "--micro-batch-size", "2"],
        ["--reward", "reviews", "--epochs", "1", "--sample.max-tokens", "4"],
    ),
    "grpo, QLoRA": (
        "grpo", "--data", "verifiable", ["--rollouts", "2", "--prompts-per-rollout", "4", "--minibatches", "2", "--micro-batch-size", "2"],
        ["--reward.rewards", "random", "--sample.group-size", "4", "--sample.max-tokens", "4", "--adapter.rank", "2",
         "--adapter.quantise", "nf4"],
    ),
}  # fmt: skip


def command(data, method: str, out, seed: int = 0) -> list[str]:
    verb, name, kind, batches, more = METHODS[method]
    words = [verb, data / "model", name, data / f"{kind}.jsonl", "--out", out, *batches, *more]
    words += ["--teacher", data / "teacher"] if verb == "distill" else []
    words += ["--train.steps", 4, "--train.warmup-steps", 1, "--train.dtype", "float32", "--train.num-threads", 2, "--train.seed", seed]
    return [str(word) for word in [*words, "--train.keep-every-steps", 2, "--train.device", "cpu", "--train.optimizer.lr", 0.01]]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Return a function that gives a method's run of a seed, trained once."""
    runs, folder = {}, tmp_path_factory.mktemp("runs")

    def run(method: str, seed: int = 0, copy: int = 0):
        if (method, seed, copy) not in runs:
            out = folder / f"{len(runs)}"
            assert main(command(data, method, out, seed)) == 0
            runs[method, seed, copy] = out
        return runs[method, seed, copy]

    return run


def weights(run) -> dict[str, torch.Tensor]:
    return load_model(run / "model").state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_on_a_cpu_llama_factory_8982(data, trained, method):
    before, after = load_model(data / "model").state_dict(), weights(trained(method))
    pairs = [(before[name.removeprefix("trunk.")], after[name]) for name in after if name.removeprefix("trunk.") in before]
    assert pairs and any(not torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_a_run_and_another_seed_another_trl_1014_trl_1810_ms_swift_3607(trained, method):
    first, same, other = weights(trained(method)), weights(trained(method, copy=1)), weights(trained(method, seed=1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_cut_in_two_is_the_whole_run_peft_859_torchtune_1142(data, trained, tmp_path, method):
    """Weights, optimizer, adapters, and the order of the data: the second half is trained again from the checkpoint in the middle."""
    whole, cut = trained(method), tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "DONE").unlink()
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "adapter", ignore_errors=True)
    _, *later = sorted((cut / "checkpoints").glob("step_*"))
    for checkpoint in later:
        shutil.rmtree(checkpoint)
    assert main([*command(data, method, cut), "--resume"]) == 0
    assert [record["step"] for record in Run.open(cut).metrics()] == [1, 2, 3, 4]
    a, b = weights(whole), weights(cut)
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- class 8: what is saved is what was trained ---


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_survives_saving_merging_and_loading_again_peft_2321_transformers_31293(tmp_path, tied):
    shape, tokens = DecoderConfig(**{**SHAPE.__dict__, "tie_embeddings": tied}), torch.arange(40).view(2, 20)
    model = add_adapters(decoder(shape), LoraConfig(4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(3))

    def scores(model):
        with torch.no_grad():
            return model.logits(model(tokens))

    trained_scores = scores(model)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(scores(load_adapter(decoder(shape), tmp_path / "adapter")), trained_scores, rtol=0, atol=1e-5)
    save_model(merge(model), None, tmp_path / "merged")
    once = load_decoder(tmp_path / "merged")
    torch.testing.assert_close(scores(once), trained_scores, rtol=0, atol=1e-4)
    save_model(once, None, tmp_path / "again")
    again = load_decoder(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), again.parameters()))
    assert (again.head is None) == tied
    params = SamplingParams(temperature=0.0, max_tokens=1)
    assert Engine(again).generate([tokens[0].tolist()], params)[0].tokens == [int(trained_scores[0, -1].argmax())]


# --- class 15: installation and imports ---

POST_TRAINING = ("sft", "prefer", "reward", "distill", "merge", "known", "inspect", "feedback", "best-of", "revise")
EXTRAS = ("transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes", "vllm", "deepspeed", "huggingface_hub", "wandb")


def test_the_command_itself_imports_nothing_heavy_verl_429():
    """`plinth --help` and a mistyped verb answer before PyTorch is touched."""
    code = (
        "import sys; from plinth.cli.main import main; main(['--help']); main(['sftt']); "
        "print([module for module in sys.argv[1:] if module in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, "torch", "numpy", *EXTRAS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_no_method_needs_another_trainer_verl_513_trl_7020():
    """Help and configuration of every method import with what `pip install` brings, and none of the packages that pin one another."""
    code = (
        "import sys, importlib\n"
        f"blocked = {EXTRAS!r}\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in blocked: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "for module in sys.argv[1:]: importlib.import_module(module)\n"
        "print('ok')\n"
    )
    modules = sorted({VERBS[verb][0] for verb in POST_TRAINING})
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


# --- the page ---

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^## (\d+)\. (.*?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)")


def test_the_page_names_a_test_that_exists_for_each_of_the_fifteen_classes():
    sections = SECTION.findall((ROOT / "docs" / "complaints.md").read_text(encoding="utf-8"))
    assert [int(number) for number, _, _ in sections] == list(range(1, 16))
    for number, title, text in sections:
        references = REFERENCE.findall(text)
        assert references and "https://github.com/" in text, f"{number}. {title}"
        for name, file in references:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file} has no {name}"
