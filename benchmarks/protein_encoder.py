"""Does an encoder learn protein families from their sequences alone? Held-out loss and family by nearest centroid, three seeds.

Families are invented (plinth.tasks.protein_families), since nothing is downloaded: this tries the path from FASTA to vectors, not biology.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from plinth.data.curate import CurateConfig, curate
from plinth.data.shards import pack_corpus
from plinth.data.sources import read_documents
from plinth.inference.encoding import embed_texts
from plinth.models.encoder import EncoderModel
from plinth.models.encoder_config import EncoderConfig
from plinth.models.hub import load_model, save_model
from plinth.recipes.encoder_pretraining import BertConfig, encoder_train_config, pretrain_encoder
from plinth.recipes.encoder_rows import RowConfig
from plinth.tasks.protein_families import RESIDUES, FamilyConfig, invent_families, to_fasta
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.residues import residue_tokenizer
from record import spread, write_record

FAMILIES = {"families": 64, "members": 30, "shortest": 40, "longest": 70, "conserved_rate": 0.1, "variable_rate": 0.7}
SHAPE = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "intermediate_size": 384, "max_seq_len": 128}


def composition(sequences: list[str]) -> np.ndarray:
    """Return how often each amino acid occurs in each sequence, the vector that needs no model."""
    return np.array([[sequence.count(residue) / len(sequence) for residue in RESIDUES] for sequence in sequences])


def centroid_accuracy(train: np.ndarray, train_family: np.ndarray, held: np.ndarray, held_family: np.ndarray) -> float:
    """Return the share of held-out sequences whose nearest centroid, of standardised vectors by cosine, is their family's."""
    mean, deviation = train.mean(0), train.std(0) + 1e-9
    train, held = (train - mean) / deviation, (held - mean) / deviation
    centroids = np.stack([train[train_family == family].mean(0) for family in range(train_family.max() + 1)])
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (held, centroids)]
    return float(((unit[0] @ unit[1].T).argmax(1) == held_family).mean())


def one_seed(folder: Path, seed: int, steps: int) -> dict:
    members = {member.sequence: member for member in invent_families(FamilyConfig(**FAMILIES, seed=seed))}
    (folder / "all.fasta").write_text(to_fasta(list(members.values())))
    config = CurateConfig(heldout_fraction=0.2, near_duplicate_threshold=None, seed=seed)
    curate(read_documents([folder / "all.fasta"]), folder / "corpus", config)
    residue_tokenizer("protein").save(folder / "tokenizer")
    pack_corpus(folder / "corpus", Tokenizer.load(folder / "tokenizer"), folder / "shards")
    train = encoder_train_config()
    bert = BertConfig(
        model=EncoderConfig(**SHAPE),
        train=type(train)(**{**train.__dict__, "steps": steps, "seed": seed}),
        data=RowConfig(rows="document", seq_len=80, sequences_per_step=64, micro_batch_size=32),
    )
    run = pretrain_encoder(folder / "run", [folder / "shards"], folder / "tokenizer", bert)
    model = load_model(run.model_dir)
    fresh = EncoderModel(model.config).init_weights(torch.Generator().manual_seed(seed))
    save_model(fresh, Tokenizer.load(run.model_dir), folder / "untrained" / "model")
    sequences = {split: pq.read_table(folder / "corpus" / f"{split}.parquet")["text"].to_pylist() for split in ("train", "heldout")}
    families = {split: np.array([members[text].family for text in texts]) for split, texts in sequences.items()}

    def accuracy(embed) -> float:
        return centroid_accuracy(embed(sequences["train"]), families["train"], embed(sequences["heldout"]), families["heldout"])

    return {
        "seed": seed,
        "sequences": len(sequences["train"]),
        "heldout_sequences": len(sequences["heldout"]),
        "num_params": run.summary["num_params"],
        "tokens": run.summary["tokens"],
        "unigram_nats": run.summary["heldout_unigram_nats"],
        "model_nats": run.summary["heldout_nats"],
        "ancestor_nats": float(np.mean([members[text].nats for text in sequences["heldout"]])),
        "accuracy_composition": accuracy(composition),
        "accuracy_untrained": accuracy(lambda texts: embed_texts(folder / "untrained", texts)),
        "accuracy_trained": accuracy(lambda texts: embed_texts(run.path, texts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    options = parser.parse_args()
    rows = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(one_seed(Path(folder), seed, options.steps))
        print(rows[-1])
    numbers = [name for name in rows[0] if name.endswith("nats") or name.startswith("accuracy")]
    summary = {name: spread([row[name] for row in rows]) for name in numbers}
    question = (
        "does an encoder learn protein families from their sequences alone? held-out nats a hidden residue, families by nearest centroid"
    )
    path = write_record(
        "protein_encoder", question, rows, summary=summary, shape=SHAPE, steps=options.steps, families=FamilyConfig().families
    )
    print(path)


if __name__ == "__main__":
    main()
