"""The probe measures this machine for real, with the project's own training step."""

import pytest
import torch

from plinth.config import from_dict, to_dict
from plinth.scaling.probe import Probe, cgroup_limit_files, mfu, probe_machine, resident_bytes, usable_memory
from plinth.training.throughput import measure_tokens_per_s


def test_probe_of_this_machine():
    lines = []
    probe = probe_machine(measure_tokens_per_s, limit_s=1.0, on_progress=lines.append)
    assert set(probe.matmul_flops_per_s) == {"float32", "bfloat16"} and probe.dtype in probe.matmul_flops_per_s
    faster = probe.matmul_flops_per_s["bfloat16"] > 1.3 * probe.matmul_flops_per_s["float32"]
    assert probe.dtype == ("bfloat16" if faster else "float32")
    assert probe.bandwidth_bytes_per_s > 1e7 and probe.memory_bytes > 1e8 and probe.cores >= 1
    point = probe.train_points[0]
    assert point.tokens_per_step == probe.cores * point.micro_batch_size * point.seq_len
    assert probe.device == "cpu" and probe.workers == probe.cores
    assert probe.time_model.num_points == len(probe.train_points) >= 1
    assert mfu(probe, point.config, point.seq_len, point.tokens_per_s) > 0
    assert lines[0] == "matrix products" and any("layers x" in line for line in lines)
    assert from_dict(Probe, to_dict(probe)) == probe


def test_memory_limits_of_both_control_group_versions(tmp_path):
    whole, source = usable_memory(tmp_path)
    assert source == "the machine" and whole > 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert usable_memory(tmp_path)[0] == whole
    (tmp_path / "memory.max").write_text("50000000\n")
    assert usable_memory(tmp_path) == (50_000_000, "the control group")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0::/user.slice/job", ["memory.max", "user.slice/memory.max", "user.slice/job/memory.max"]),
        ("8:cpu,memory:/docker/abc", ["memory/docker/memory.limit_in_bytes", "memory/docker/abc/memory.limit_in_bytes"]),
        ("3:cpuset:/elsewhere", []),
    ],
)
def test_the_groups_of_this_process(tmp_path, line, expected):
    membership = tmp_path / "cgroup"
    membership.write_text(line + "\n")
    found = {str(path.relative_to(tmp_path)) for path in cgroup_limit_files(tmp_path, membership)}
    assert {"memory.max", "memory/memory.limit_in_bytes", *expected} == found


def test_memory_that_the_process_holds_is_counted_in_the_plan(tmp_path):
    held = resident_bytes()
    block = bytearray(b"x" * 50_000_000)
    assert held == 0 or resident_bytes() - held > 40_000_000
    assert resident_bytes(tmp_path / "absent") == 0 and len(block) == 50_000_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU here")
def test_probe_of_a_gpu():
    probe = probe_machine(measure_tokens_per_s, device="cuda")
    assert probe.cpu.startswith(torch.cuda.get_device_name(0)) and probe.memory_source == "the GPU"
    assert probe.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert probe.dtype == "bfloat16" and probe.workers == 1 and probe.process_bytes == 0
    point = probe.train_points[-1]
    assert point.tokens_per_step == point.micro_batch_size * point.seq_len
    assert from_dict(Probe, to_dict(probe)) == probe
