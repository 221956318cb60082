"""Samples of a node: real numbers of this machine, GPUs by a stand-in of NVML, and faults that stop nothing."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pretrain.tracking import system_metrics
from pretrain.tracking.system_metrics import NodeProbe, SystemMonitor


def _wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _samples(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_node_is_sampled_at_intervals_and_once_more_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "system" / "attempt_0001" / "node_00000.jsonl"
    with SystemMonitor(path, 0.02, folder=tmp_path, extra=lambda: {"data_wait_share": 0.25}):
        _wait_for(lambda: len(_samples(path)) >= 3)
        before = len(_samples(path))
    samples = _samples(path)
    assert len(samples) > before
    times = [sample["time"] for sample in samples]
    assert times == sorted(times)
    for sample in samples:
        metrics = sample["metrics"]
        assert sample["event"] == "system"
        assert 0 <= metrics["cpu_utilization_percentage"] <= 100
        assert 0 < metrics["system_memory_usage_percentage"] <= 100
        assert 0 < metrics["system_memory_usage_megabytes"] <= psutil.virtual_memory().total / 1e6
        assert metrics["disk_available_gib"] > 0
        assert metrics["data_wait_share"] == 0.25


def test_a_run_shorter_than_the_interval_has_one_sample(tmp_path: Path) -> None:
    path = tmp_path / "node_00000.jsonl"
    SystemMonitor(path, 3600.0, folder=tmp_path).close(timeout=60.0)
    assert len(_samples(path)) == 1


def test_rates_are_means_since_the_sample_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"network_receive": 1e6}
    clock = [100.0]
    monkeypatch.setattr(system_metrics, "_running_sums", lambda: dict(sums))
    monkeypatch.setattr(system_metrics.time, "monotonic", lambda: clock[0])
    probe = NodeProbe(tmp_path)
    sums["network_receive"] = 9e6
    clock[0] = 104.0
    assert probe.sample()["network_receive_megabytes_per_s"] == 2.0
    sums["network_receive"] = 0.0  # a card that was reset
    clock[0] = 105.0
    assert probe.sample()["network_receive_megabytes_per_s"] == 0.0


def test_gpus_are_read_and_what_one_does_not_tell_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def utilization(handle: int) -> Any:
        if handle == 1:
            raise RuntimeError("not supported on a MIG slice")
        return SimpleNamespace(gpu=87)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=utilization,
        nvmlDeviceGetPowerUsage=lambda handle: 350_500,
        nvmlDeviceGetTemperature=lambda handle, sensor: 61,
        NVML_TEMPERATURE_GPU=0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    metrics = NodeProbe(tmp_path).sample()
    assert metrics["gpu_0_utilization_percentage"] == 87
    assert "gpu_1_utilization_percentage" not in metrics
    assert metrics["gpu_1_memory_usage_percentage"] == 25.0
    assert metrics["gpu_1_power_usage_watts"] == 350.5
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert not any(name.startswith("gpu") for name in NodeProbe(tmp_path).sample())


def test_a_folder_that_cannot_be_written_is_told_once_and_sampling_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "system").write_text("a file where the folder should be")
    path = tmp_path / "system" / "node_00000.jsonl"
    tried: list[int] = []
    with caplog.at_level(logging.WARNING), SystemMonitor(path, 0.01, folder=tmp_path) as monitor:
        _wait_for(lambda: caplog.records)
        (tmp_path / "system").unlink()
        _wait_for(lambda: len(_samples(path)) >= 2)
        monitor.close()
        tried.append(len(caplog.records))
    assert tried == [1]


def test_numbers_that_json_lacks_do_not_end_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = iter([float("nan"), 1.0, 2.0])
    path = tmp_path / "node_00000.jsonl"
    with (
        caplog.at_level(logging.WARNING),
        SystemMonitor(path, 0.01, folder=tmp_path, extra=lambda: {"x": next(values, 3.0)}),
    ):
        _wait_for(lambda: len(_samples(path)) >= 2)
    assert _samples(path)[0]["metrics"]["x"] == 1.0
