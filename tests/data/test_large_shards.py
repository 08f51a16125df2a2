"""Shards larger than memory: the loader's own memory stays bounded, and a far step costs what a near one does."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from plinth.config import save_json

NUM_DOCUMENTS, DOCUMENT_TOKENS = 20_000_000, 1000
SIDE_BYTES = NUM_DOCUMENTS * (8 + 8 + 8 + 2)

PROGRAM = """
import json, sys
from pathlib import Path
from plinth.data.loader import TokenLoader

def peak_bytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak_bytes()
options = json.loads(sys.argv[2])
loader = TokenLoader(Path(sys.argv[1]), 512, 16, seed=0, **options)
for step in [0, 10**6, 10**9, *range(20)]:
    loader.batch(step)
print(json.dumps({"grown_bytes": peak_bytes() - before, "num_tokens": loader.num_tokens, "documents": loader.documents(10**9)[0]}))
"""


def sparse_column(path, dtype, length):
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)})
        file.truncate(file.tell() + length * np.dtype(dtype).itemsize)


@pytest.fixture(scope="module")
def large_shards(tmp_path_factory):
    """20 million documents, 40 GB of tokens; all but the offsets are holes in files, so it takes 160 MB of disk."""
    folder = tmp_path_factory.mktemp("large")
    num_tokens = NUM_DOCUMENTS * DOCUMENT_TOKENS
    with (folder / "train.bin").open("wb") as file:
        file.truncate(num_tokens * 2)
    np.save(folder / "train.offsets.npy", np.arange(NUM_DOCUMENTS + 1, dtype=np.int64) * DOCUMENT_TOKENS)
    for name, dtype in (("bytes", np.int64), ("chars", np.int64), ("kinds", np.uint16)):
        sparse_column(folder / f"train.{name}.npy", dtype, NUM_DOCUMENTS)
    save_json(folder / "manifest.json", {"dtype": "<u2", "kinds": ["web"], "tokens_train": num_tokens})
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("options", [{}, {"kind_weights": {"web": 1}}, {"mask_documents": True}])
def test_memory_is_bounded_however_large_the_shards_are(large_shards, options):
    done = subprocess.run([sys.executable, "-c", PROGRAM, large_shards, json.dumps(options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["num_tokens"] == NUM_DOCUMENTS * DOCUMENT_TOKENS
    assert sum(length for *_, length in answer["documents"]) == 512
    assert answer["grown_bytes"] < SIDE_BYTES // 4, f"{answer['grown_bytes']:,} bytes"
