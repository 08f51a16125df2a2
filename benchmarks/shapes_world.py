"""Do models of images combine what they saw apart? Drawn shapes, a fifth of the combinations held out; three seeds.

    python benchmarks/shapes_world.py            # some ten minutes on two quiet cores; writes benchmarks/records/shapes_world.json

A CLIP is trained on captions of the other combinations and must find, among the captions of all 192, the one of an image whose
combination it never saw. Then a small decoder, taught on text alone to answer questions behind a description, is given that CLIP's eyes:
first only the projector between the two is trained, then the decoder too; the questions are on held-out combinations again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from plinth.data.pictures import read_pictures
from plinth.evaluation.zero_shot import ImageTextModel
from plinth.inference.sampling_params import SamplingParams
from plinth.models.config import DecoderConfig
from plinth.models.dual_encoder import DualEncoderConfig, TextTowerConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from plinth.models.vision import VisionConfig
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.recipes.asking_images import ask_images
from plinth.recipes.clip import ClipConfig, pretrain_clip
from plinth.recipes.llava import LlavaConfig, train_llava
from plinth.recipes.shapes_world import write_world
from plinth.tasks.shapes import QUESTIONS, TEMPLATES, Drawing, all_drawings, split_drawings
from plinth.tokenizer.encode import Tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import spread, write_record

QUESTION = "What share of images, whose combination no training image showed, is named right, and answered on right?"
TOWERS = DualEncoderConfig(
    TextTowerConfig(hidden_size=96, num_layers=2, num_heads=3, intermediate_size=384, max_seq_len=24),
    VisionConfig(image_size=32, patch_size=8, hidden_size=96, num_layers=3, num_heads=3, intermediate_size=384),
    projection_size=64,
)
DECODER = DecoderConfig(hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=32, intermediate_size=384, max_seq_len=96)


def training(steps: int, lr: float, seed: int, name: str = "adamw") -> TrainConfig:
    return TrainConfig(
        steps=steps, warmup_steps=20, decay_fraction=0.5, keep_pre_decay=False, checkpoint_every_s=1e9, seed=seed,
        optimizer=OptimizerConfig(name=name, lr=lr, muon_lr=0.02),
    )  # fmt: skip


def shown(folder: Path, drawings: list[Drawing], images_each: int, most: int) -> list[tuple[Path, Drawing]]:
    """Return images with what they show, as `write_drawings` numbers them, spread evenly over the combinations."""
    pictures, _ = read_pictures(folder)
    pairs = [(picture.image, drawing) for picture, (drawing, _) in zip(pictures, itertools.product(drawings, range(images_each)))]
    return pairs[:: max(1, len(pairs) // most)]


def name_images(model: ImageTextModel, pairs: list[tuple[Path, Drawing]]) -> dict[str, float]:
    """Return the shares of images named right among all combinations, and of each attribute of the named one."""
    every = all_drawings()
    vectors = model.images([image for image, _ in pairs])
    by_template = [model.texts([drawing.caption(template) for drawing in every]) for template in TEMPLATES]
    right = torch.tensor([every.index(drawing) for _, drawing in pairs])
    single = [(vectors @ classes.t()).argmax(1) for classes in by_template]
    together = (vectors @ torch.nn.functional.normalize(sum(by_template) / len(by_template), dim=-1).t()).argmax(1)
    scores = {"one_template": float(np.mean([(found == right).double().mean().item() for found in single]))}
    scores["all_templates"] = (together == right).double().mean().item()
    for name in QUESTIONS:
        hits = [getattr(every[i], name) == getattr(drawing, name) for i, (_, drawing) in zip(together.tolist(), pairs)]
        scores[name] = float(np.mean(hits))
    return scores


def teach_text(folder: Path, drawings: list[Drawing], tokenizer: Tokenizer, seed: int, steps: int) -> Path:
    """Return a decoder that answers questions behind a description in words; it never saw an image."""
    config = DecoderConfig(**{**DECODER.__dict__, "vocab_size": tokenizer.vocab_size})
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(seed)), tokenizer, folder / "untaught")
    lines = []
    for drawing, template, phrasing in itertools.product(drawings, TEMPLATES, (0, 1)):
        for question, answer in drawing.questions(phrasing):
            turns = [{"role": "user", "content": f"{drawing.caption(template)} {question}"}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": turns}) + "\n")
    (folder / "text.jsonl").write_text("".join(lines))
    config_sft = SftConfig(train=training(steps, 0.002, seed), conversations_per_step=64, micro_batch_size=32)
    return train_sft(folder / "taught", folder / "untaught", folder / "text.jsonl", config_sft).path


def answer_questions(run: Path, pairs: list[tuple[Path, Drawing]]) -> dict[str, float]:
    """Return the share of answers that are right, of each attribute and of all."""
    asked = [(image, name, *pair) for image, drawing in pairs for name, pair in zip(QUESTIONS, drawing.questions())]
    found = ask_images(run, [(image, question) for image, _, question, _ in asked], SamplingParams(temperature=0.0, max_tokens=12))
    hits = [(name, completion.text.strip() == answer) for (_, name, _, answer), completion in zip(asked, found)]
    return {name: float(np.mean([hit for other, hit in hits if other == name])) for name in QUESTIONS} | {
        "all": float(np.mean([hit for _, hit in hits]))
    }


def run_seed(seed: int, images_each: int, scale: float) -> dict:
    """Train everything once; returns its scores."""
    kept, out = split_drawings(0.2, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = write_world(folder / "world", images_each, 0.2, seed)
        held_out = shown(world["held_out"], out, images_each, 300)
        clip = pretrain_clip(
            folder / "clip", world["train"],
            # Large micro-batches: with few pairs to tell apart, three of the four attributes suffice, and the shape is not learnt.
            ClipConfig(model=TOWERS, train=training(round(600 * scale), 0.003, seed, "muon"), pairs_per_step=256, micro_batch_size=128,
                       tokenizer_size=400),
        )  # fmt: skip
        row = {"seed": seed, "clip": name_images(ImageTextModel.load(clip.path), held_out), "clip_s": clip.summary["time_s"]}
        print(row, flush=True)
        decoder = teach_text(folder, kept, Tokenizer.load(clip.model_dir), seed, round(500 * scale))
        stages, start = {}, {"decoder": decoder, "vision": clip.path}
        for trained, lr in (("projector", 0.003), ("decoder", 0.001)):
            config = LlavaConfig(train=training(round(400 * scale), lr, seed), trained=trained, questions_per_step=64, micro_batch_size=32)
            run = train_llava(folder / trained, world["train"], config, **start)
            stages[trained] = answer_questions(run.path, held_out[::3]) | {
                "first_loss_nats": run.metrics()[0]["loss_nats"],
                "last_loss_nats": run.summary["loss_nats"],
                "time_s": run.summary["time_s"],
            }
            start = {"start": run.path}
            print(trained, stages[trained], flush=True)
        return row | {"llava": stages, "images": len(held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images-each", type=int, default=30, help="images a combination")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of updates")
    arguments = parser.parse_args()
    rows = [run_seed(seed, arguments.images_each, arguments.scale) for seed in range(arguments.seeds)]
    summary = {f"clip_{name}": spread([row["clip"][name] for row in rows]) for name in rows[0]["clip"]}
    for stage in ("projector", "decoder"):
        summary |= {f"{stage}_{name}": spread([row["llava"][stage][name] for row in rows]) for name in (*QUESTIONS, "all")}
    chance = {"clip": 1 / len(all_drawings()), "questions": float(np.mean([1 / 6, 1 / 4, 1 / 2, 1 / 4]))}
    path = write_record("shapes_world", QUESTION, rows, summary=summary, chance=chance, updates_scale=arguments.scale,
                        images_a_combination=arguments.images_each)  # fmt: skip
    print(path)


if __name__ == "__main__":
    main()
