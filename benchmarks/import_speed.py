"""Does importing a 500 MB checkpoint take what the disk takes, and how much memory do import and load need beside the weights?

A decoder of 125 M parameters in fp32, in two files, is imported (checked, copied, hashed), copied by `cp` and brought to the disk, in
alternation, each in a process of its own behind an emptied cache of its files; then it is read by our load_model and by transformers.
Memory is the process's peak less what it held once its libraries were loaded. Writes benchmarks/records/import_speed.json; takes a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.transformer import Transformer
from record import spread, write_record

CONFIG = DecoderConfig(
    vocab_size=50_304, hidden_size=768, num_layers=12, num_heads=12, num_kv_heads=12, intermediate_size=2048, learnable_norm=True
)
MEASURED = """
import json, resource, sys, time
{libraries}
def held(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
before, began, usage = held("VmRSS"), time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
spent = usage.ru_utime + usage.ru_stime
{work}
took, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({{"time_s": took, "cpu_s": usage.ru_utime + usage.ru_stime - spent, "peak_bytes": held("VmHWM") - before}}))
"""
WAYS = {
    "plinth import": (
        "from plinth.recipes.importing import import_model",
        "import_model(sys.argv[1], sys.argv[2], parity=False)",
    ),
    "plinth import with the comparison": (
        "from plinth.recipes.importing import import_model",
        "import_model(sys.argv[1], sys.argv[2])",
    ),
    "cp and sync": (
        "import os, shutil",
        "shutil.copytree(sys.argv[1], sys.argv[2])\\nfor name in os.listdir(sys.argv[2]):\\n"
        "    with open(os.path.join(sys.argv[2], name), 'rb') as file: os.fsync(file.fileno())",
    ),
    "load_model": (
        "import torch\\nfrom pathlib import Path\\nfrom plinth.models.hub import load_model",
        "model = load_model(Path(sys.argv[1]))",
    ),
    "load_model in bf16": (
        "import torch\\nfrom pathlib import Path\\nfrom plinth.models.hub import load_model",
        "model = load_model(Path(sys.argv[1]), torch.bfloat16)",
    ),
    "transformers from_pretrained": (
        "import torch\\nfrom transformers import AutoModelForCausalLM, Qwen3ForCausalLM",
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\\ntotal = sum(float(p.sum()) for p in model.parameters())",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory(prefix="plinth-import-") as scratch:
        source = publish(Path(scratch) / "published")
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        for turn in range(arguments.rounds):
            for name, (libraries, work) in WAYS.items():
                forget(source)
                code = MEASURED.format(libraries=libraries.replace("\\n", "\n"), work=work.replace("\\n", "\n"))
                target = Path(scratch) / "out"
                done = subprocess.run([sys.executable, "-c", code, str(source), str(target)], capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                shutil.rmtree(target, ignore_errors=True)
                print(f"round {turn + 1} {name}: {found[name][-1]}", file=sys.stderr)
    rows = [
        {
            "way": name,
            "time_s": spread([one["time_s"] for one in measured]),
            "cpu_s": spread([one["cpu_s"] for one in measured]),
            "mb_per_s": size / 1e6 / spread([one["time_s"] for one in measured])["median"],
            "peak_share_of_weights": spread([one["peak_bytes"] / size for one in measured]),
        }
        for name, measured in found.items()
    ]
    print(write_record("import_speed", __doc__.splitlines()[0], rows, weights_bytes=size))
    return 0


def publish(folder: Path) -> Path:
    """Write the checkpoint in two files, as the hub has it."""
    save_model(Transformer(CONFIG).init_weights(torch.Generator().manual_seed(0)), None, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(weight_map.values())):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    (folder / "plinth.json").unlink()
    return folder


def forget(folder: Path) -> None:
    """Ask the system to drop the files of a folder from its cache, so that they come from the disk."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
