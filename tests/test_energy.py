"""Counters are read from a folder laid out as Linux lays out powercap."""

import os
import time

from plinth.energy import EnergyMeter, NvidiaSmiMeter, estimate_energy, rapl_domains


def domain(root, number, name, energy_uj, wrap=1000):
    path = root / f"intel-rapl:{number}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "name").write_text(name + "\n")
    (path / "energy_uj").write_text(f"{energy_uj}\n")
    (path / "max_energy_range_uj").write_text(f"{wrap}\n")
    return path


def test_packages_and_memory_count_once(tmp_path):
    package = domain(tmp_path, "0", "package-0", 100)
    domain(tmp_path, "0:0", "core", 50)
    memory = domain(tmp_path, "0:1", "dram", 10)
    domain(tmp_path, "1", "psys", 500)
    assert rapl_domains(tmp_path) == [package, memory]


def test_reads_the_difference_and_survives_the_wrap(tmp_path):
    package = domain(tmp_path, "0", "package-0", 900)
    meter = EnergyMeter(2, powercap=tmp_path).start()
    (package / "energy_uj").write_text("950\n")
    assert round(meter.read().joules * 1e6) == 50
    (package / "energy_uj").write_text("30\n")  # passed 1000 and began again
    energy = meter.read()
    assert round(energy.joules * 1e6) == 130
    assert energy.measured and "RAPL package-0" in energy.source


def test_without_counters_an_estimate_says_so(tmp_path):
    energy = EnergyMeter(2, watts_per_core=7.0, powercap=tmp_path / "absent").start().read()
    assert not energy.measured and energy.source.startswith("estimate: 2 cores x 7 W")
    assert estimate_energy(60.0, 2, 10.0).joules == 1200.0


def test_an_unreadable_counter_is_no_counter(tmp_path):
    path = domain(tmp_path, "0", "package-0", 1)
    (path / "energy_uj").write_text("")
    assert rapl_domains(tmp_path) == []


def test_nvidia_smi_power_becomes_energy(tmp_path, monkeypatch):
    """A program that prints what nvidia-smi prints: two GPUs of 100 W and 200 W, ten rounds, 20 ms apart."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8 9 10; do echo 100.0; echo 200.0; sleep 0.02; done\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    began = time.perf_counter()
    meter = NvidiaSmiMeter(["GPU-a", "GPU-b"])
    deadline = began + 30
    while meter.joules() < 300 * 0.02 * 8:
        assert time.perf_counter() < deadline
    assert meter.joules() <= 300 * (time.perf_counter() - began)
    meter.close()


def test_a_gpu_that_tells_nothing_is_said_not_to_be_counted(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '[N/A]'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    energy = EnergyMeter(2, powercap=tmp_path / "absent", gpus=["GPU-a"]).start().read()
    assert not energy.measured and "1 GPUs not counted" in energy.source and "estimate: 2 cores" in energy.source
