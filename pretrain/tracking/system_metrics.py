"""How busy a node is: CPU, memory, GPUs, network and disk, sampled by a thread of the node's first rank. Torch-free.

Samples are lines of ``system/attempt_NNNN/node_NNNNN.jsonl``, one file per node, so that no node waits for another;
rank 0's uploader sends them all. Names are those of MLflow's own system metrics where it has one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from pretrain.parallel.control_groups import memory_limits

logger = logging.getLogger(__name__)

_MB = 1e6
_GIB = 2**30


class NodeProbe:
    """One node's numbers. Rates are means since the call before; what a machine does not tell is left out.

    ``folder`` lies on the disk whose free space counts: the run directory.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus = open_gpus()
        self._then = time.monotonic()
        self._cpu = psutil.cpu_times()
        self._sums = _running_sums()

    def sample(self) -> dict[str, float]:
        """Percentages, megabytes (1e6 bytes) a second, GiB, watts, degrees Celsius."""
        now = time.monotonic()
        seconds = max(now - self._then, 1e-3)
        cpu, sums = psutil.cpu_times(), _running_sums()
        metrics = {"cpu_utilization_percentage": _busy_percent(self._cpu, cpu)}
        memory = psutil.virtual_memory()
        metrics["system_memory_usage_megabytes"] = (memory.total - memory.available) / _MB
        metrics["system_memory_usage_percentage"] = memory.percent
        limit = _memory_limit()
        if limit is not None and limit[1] < memory.total:
            metrics["job_memory_usage_megabytes"] = limit[0] / _MB
            metrics["job_memory_usage_percentage"] = 100.0 * limit[0] / limit[1]
        for name, value in sums.items():
            if name in self._sums:
                metrics[f"{name}_megabytes_per_s"] = max(0.0, value - self._sums[name]) / _MB / seconds
        with contextlib.suppress(OSError):
            disk = psutil.disk_usage(str(self._folder))
            metrics["disk_usage_percentage"] = disk.percent
            metrics["disk_available_gib"] = disk.free / _GIB
        if self._gpus is not None:
            metrics |= self._gpus()
        self._then, self._cpu, self._sums = now, cpu, sums
        return {name: round(float(value), 3) for name, value in metrics.items()}


class SystemMonitor:
    """Appends a sample of this node to ``path`` every ``interval_s`` seconds until :meth:`close`. Never raises.

    ``extra`` gives further numbers of this process by name, such as those of its data; it is called in the thread.
    The first sample comes one interval after the start, the last at the end: a short run has one.
    """

    def __init__(
        self,
        path: Path,
        interval_s: float,
        *,
        folder: Path,
        extra: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        self._path = path
        self._interval_s = interval_s
        self._folder = folder
        self._extra = extra
        self._closing = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Takes the last sample; gives it up after ``timeout`` seconds (a file system or driver that hangs)."""
        self._closing.set()
        self._thread.join(timeout)

    def __enter__(self) -> SystemMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        probe: NodeProbe | None = None
        while True:
            try:
                if probe is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    probe = NodeProbe(self._folder)
                is_last = self._closing.wait(self._interval_s)
                self._append(probe)
                self._failed = False
            except Exception as error:
                # A driver or a file system that fails: worth one line, and no reason to stop.
                is_last = self._closing.wait(self._interval_s)
                if not self._failed:
                    logger.warning("system metrics: %s: %s", type(error).__name__, error)
                self._failed = True
            if is_last:
                return

    def _append(self, probe: NodeProbe) -> None:
        metrics = dict(probe.sample())
        if self._extra is not None:
            metrics |= {name: float(value) for name, value in self._extra().items()}
        record = {"time": time.time(), "event": "system", "metrics": metrics}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            written = os.write(descriptor, line)
            if written < len(line):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)  # the disk is full: no half lines
        finally:
            os.close(descriptor)


def open_gpus() -> Callable[[], dict[str, float]] | None:
    """A function that reads this node's NVIDIA GPUs; None without nvidia-ml-py, a driver or a GPU."""
    try:
        pynvml = importlib.import_module("pynvml")

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # not installed, no driver, a driver of another version: all mean no GPU numbers
        return None
    return (lambda: _read_gpus(pynvml, handles)) if handles else None


def _read_gpus(nvml: Any, handles: list[Any]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for index, handle in enumerate(handles):
        name = f"gpu_{index}"
        # Each question may be unsupported by itself (MIG slices have no utilization).
        with contextlib.suppress(Exception):
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            metrics[f"{name}_memory_usage_megabytes"] = memory.used / _MB
            metrics[f"{name}_memory_usage_percentage"] = 100.0 * memory.used / memory.total
        with contextlib.suppress(Exception):
            metrics[f"{name}_utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
        with contextlib.suppress(Exception):
            metrics[f"{name}_power_usage_watts"] = nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0
        with contextlib.suppress(Exception):
            metrics[f"{name}_temperature_celsius"] = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
    return metrics


def _busy_percent(before: Any, after: Any) -> float:
    """Share of all cores' time between two readings that was not idle."""
    # Guest time is part of user time.
    names = [name for name in after._fields if name not in ("guest", "guest_nice")]
    total = sum(getattr(after, name) - getattr(before, name) for name in names)
    idle = sum(getattr(after, name) - getattr(before, name) for name in names if name in ("idle", "iowait"))
    return 100.0 * max(0.0, min(1.0, 1.0 - idle / total)) if total > 0 else 0.0


def _running_sums() -> dict[str, float]:
    """Bytes since boot: network (without loopback), InfiniBand, disks."""
    sums: dict[str, float] = {}
    with contextlib.suppress(Exception):
        cards = [card for name, card in psutil.net_io_counters(pernic=True).items() if name != "lo"]
        if cards:
            sums["network_receive"] = float(sum(card.bytes_recv for card in cards))
            sums["network_transmit"] = float(sum(card.bytes_sent for card in cards))
    with contextlib.suppress(Exception):
        disks = psutil.disk_io_counters()
        if disks is not None:
            sums["disk_read"], sums["disk_write"] = float(disks.read_bytes), float(disks.write_bytes)
    # RDMA passes the kernel's network counters by.
    for direction, counter in (("receive", "port_rcv_data"), ("transmit", "port_xmit_data")):
        files = Path("/sys/class/infiniband").glob(f"*/ports/*/counters/{counter}")
        with contextlib.suppress(OSError, ValueError):
            words = [int(path.read_text()) for path in files]
            if words:
                sums[f"infiniband_{direction}"] = 4.0 * sum(words)  # counted in words of four bytes
    return sums


def _memory_limit() -> tuple[float, float] | None:
    """Bytes used and allowed of the control group that this process is confined to; None without a limit."""
    nearest = next(memory_limits(), None)
    return None if nearest is None else (float(nearest.used), float(nearest.limit))
