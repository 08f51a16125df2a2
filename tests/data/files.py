"""Shards folders for tests, written by the project's own writer."""

from plinth.config import save_json
from plinth.data.shards import SplitWriter, token_dtype

END = 0


def write_shards(folder, lengths, kinds=None, first_id=1, tokenizer="t"):
    """Write shards whose ids are all different, but for the end of text, so that each can be followed; the heldout split likewise."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(1 << 20)
    numbers: dict[str, int] = {}
    counts, next_id = {}, first_id
    for split in ("train", "heldout"):
        writer = SplitWriter(folder, split, dtype, END, numbers)
        for index, length in enumerate(lengths):
            ids = list(range(next_id, next_id + length))
            next_id += length
            writer.add([ids], ["\u00e9" * length], [kinds[index] if kinds else "text"])
        writer.close()
        counts[f"tokens_{split}"] = sum(lengths) + len(lengths)
    manifest = {"dtype": dtype.str, "kinds": list(numbers), "tokenizer_sha256": tokenizer, "sha256": {}, **counts}
    save_json(folder / "manifest.json", manifest)
    return folder
