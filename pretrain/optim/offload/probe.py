"""Measures the constants of the planner in seconds: link, CPU's and device's AdamW, alone and side by side."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.config.files import atomic_write_text
from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.constants import Constants
from pretrain.optim.offload.cpu_adamw import cpu_adamw_, kernel_level
from pretrain.optim.offload.host_memory import available_host_bytes

LARGEST_COPY = 256 << 20
LARGEST_UPDATE = 8 << 20
"""Elements of one CPU update: 144 MiB of state, gradient and weight, far more than caches hold."""
_SMALLEST = 1 << 20
_SLICES = 8  # of the time: one for each thing that is measured
_SCALARS = StepScalars.of(step=2, learning_rate=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def probe(device: torch.device, *, seconds: float = 5.0, threads: int | None = None) -> Constants:
    """Constants of this process's share of its host and link to ``device``.

    Each rate is the median of rounds. With a CUDA device copies go through pinned memory on streams of their own and
    are timed by events. **Without a device** (``cpu``) copies from host to host stand for transfers, one thread each
    way, and the CPU's update for the device's: good for predictions on the host and for trying out schedules, no
    measure of any link.

    Args:
        seconds: about how long it may take, besides starting up (compiling kernels).
        threads: of the CPU's update (None: torch's number).
    """
    transfers: _Transfers = _CudaTransfers(device) if device.type == "cuda" else _HostTransfers()
    update = _HostUpdate(threads)
    share = seconds / _SLICES
    up, _ = transfers.rates(True, False, share)
    _, down = transfers.rates(False, True, share)
    up_duplex, down_duplex = transfers.rates(True, True, share)
    alone = update.rate(share)
    with update.running() as running:
        slowed = [
            (transfers.rates(True, False, share)[0], up),
            (transfers.rates(False, True, share)[1], down),
        ]
        running.restart()
        up_beside, down_beside = transfers.rates(True, True, share)
        beside = running.rate()
    slowed += [(up_beside, up_duplex), (down_beside, down_duplex)]
    factor = math.exp(statistics.fmean(math.log(with_cpu / without) for with_cpu, without in slowed))
    return Constants(
        h2d=up,
        d2h=down,
        # Nothing goes faster because something else goes on, or because the CPU updates: noise that would tell so is
        # taken out.
        h2d_duplex=min(up, up_duplex),
        d2h_duplex=min(down, down_duplex),
        link_with_cpu=min(1.0, factor),
        cpu_adam=alone,
        cpu_adam_with_link=min(alone, beside),
        gpu_adam=transfers.update_rate(share) or alone,
        latency=transfers.latency(),
    )


class _Transfers(Protocol):
    def rates(self, up: bool, down: bool, seconds: float) -> tuple[float, float]:
        """Bytes/s to the device and back while both of what is asked for goes on; 0 for what is not."""
        ...

    def update_rate(self, seconds: float) -> float | None:
        """Elements/s of AdamW on the device, None where there is none."""
        ...

    def latency(self) -> float:
        """Seconds that an operation costs besides its work."""
        ...


class _HostUpdate:
    """AdamW of the CPU on BF16 weights with FP32 masters and gradients."""

    def __init__(self, threads: int | None) -> None:
        room = available_host_bytes() or 1 << 30
        self._numel = max(_SMALLEST, min(LARGEST_UPDATE, room // 64))
        self._threads = threads
        self._tensors = _adamw_tensors(self._numel, torch.device("cpu"))
        self()  # compiles the kernel, touches the memory

    def __call__(self) -> None:
        master, exp_avg, exp_avg_sq, gradient, weight = self._tensors
        cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, _SCALARS, threads=self._threads)

    def rate(self, seconds: float) -> float:
        """Elements/s by itself."""
        return self._numel / _median_time(self, seconds)

    @contextmanager
    def running(self) -> Iterator[_Running]:
        """Updates one after the other on a thread, as long as the context lasts."""
        running = _Running(self, self._numel)
        running.start()
        try:
            yield running
        finally:
            running.stop()


class _Running(threading.Thread):
    def __init__(self, work: Callable[[], None], numel: int) -> None:
        super().__init__(name="offload-probe", daemon=True)
        self._work = work
        self._numel = numel
        self._times: list[tuple[float, float]] = []
        self._since = 0.0
        self._stopped = threading.Event()
        self._began = threading.Event()
        self._error: BaseException | None = None

    def start(self) -> None:
        super().start()
        self._began.wait()

    def run(self) -> None:
        try:
            self._began.set()
            while not self._stopped.is_set():
                begin = time.perf_counter()
                self._work()
                self._times.append((begin, time.perf_counter()))
        except BaseException as error:
            self._error = error

    def restart(self) -> None:
        """Only updates that begin from now on count."""
        self._since = time.perf_counter()

    def rate(self) -> float:
        """Work per second since :meth:`restart`, of what began and ended since; waits for one if there is none."""
        until = time.perf_counter()
        while self.is_alive():
            whole = [end - begin for begin, end in list(self._times) if begin >= self._since]
            if whole and (len(whole) > 2 or self._times[-1][1] > until):
                break
            time.sleep(0.001)
        if self._error is not None:
            raise self._error
        return self._numel / statistics.median(whole)

    def stop(self) -> None:
        self._stopped.set()
        self.join()


class _HostTransfers:
    """Copies from host memory to host memory, one thread each way."""

    def __init__(self) -> None:
        room = available_host_bytes() or 1 << 30
        size = max(_SMALLEST, min(LARGEST_COPY // 8, room // 64))
        self._size = size
        self._pairs = [(torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)) for _ in range(2)]

    def rates(self, up: bool, down: bool, seconds: float) -> tuple[float, float]:
        works = [functools.partial(target.copy_, source) for target, source in self._pairs]
        if up and down:
            with _beside(works[1], self._size) as other:
                other.restart()
                rate = self._size / _median_time(works[0], seconds)
                return rate, other.rate()
        rate = self._size / _median_time(works[0 if up else 1], seconds)
        return (rate, 0.0) if up else (0.0, rate)

    def update_rate(self, seconds: float) -> float | None:
        return None

    def latency(self) -> float:
        return 0.0


@contextmanager
def _beside(work: Callable[[], Any], amount: int) -> Iterator[_Running]:
    running = _Running(work, amount)
    running.start()
    try:
        yield running
    finally:
        running.stop()


class _CudaTransfers:
    """Copies between pinned and device memory on a stream each way."""

    def __init__(self, device: torch.device) -> None:
        from pretrain.optim.offload.cuda import CudaDevice

        self._device = device
        host = available_host_bytes() or 1 << 30
        free, _ = torch.cuda.mem_get_info(device)
        self._size = max(_SMALLEST, min(LARGEST_COPY, host // 16, free // 16))
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]
        self._pairs = []
        memory = CudaDevice(device)  # pinned as training's, and gone with its last view
        for to_device in (True, False):
            host_side, device_side = memory.empty_host(self._size).zero_(), memory.empty_device(self._size).zero_()
            self._pairs.append((device_side, host_side) if to_device else (host_side, device_side))
        torch.cuda.synchronize(device)

    def rates(self, up: bool, down: bool, seconds: float) -> tuple[float, float]:
        wanted = [number for number, on in enumerate((up, down)) if on]
        found: list[list[float]] = [[], []]
        until = time.perf_counter() + seconds
        # So many that beginning and end weigh little, so few that the rounds are several.
        count = 8
        self._round(wanted, 2)
        while not found[wanted[0]] or time.perf_counter() < until:
            for number, rate in zip(wanted, self._round(wanted, count), strict=True):
                found[number].append(rate)
        return tuple(statistics.median(rates) if rates else 0.0 for rates in found)  # type: ignore[return-value]

    def _round(self, wanted: list[int], count: int) -> list[float]:
        """Bytes/s each way while all ways that are wanted have something to do."""
        begin = torch.cuda.Event(enable_timing=True)
        begin.record(torch.cuda.current_stream(self._device))
        events: dict[int, list[torch.cuda.Event]] = {number: [] for number in wanted}
        for number in wanted:
            self._streams[number].wait_event(begin)
        for _ in range(count):
            for number in wanted:
                target, source = self._pairs[number]
                with torch.cuda.stream(self._streams[number]):
                    target.copy_(source, non_blocking=True)
                    event = torch.cuda.Event(enable_timing=True)
                    event.record()
                    events[number].append(event)
        for number in wanted:
            events[number][-1].synchronize()
        ends = {number: [begin.elapsed_time(event) / 1e3 for event in events[number]] for number in wanted}
        until = min(times[-1] for times in ends.values())
        return [_done_by(ends[number], until) * self._size / until for number in wanted]

    def update_rate(self, seconds: float) -> float | None:
        from pretrain.optim.offload.gpu_adamw import gpu_adamw_

        numel = self._size // 16
        master, exp_avg, exp_avg_sq, gradient, weight = _adamw_tensors(numel, self._device)

        def work() -> None:
            for _ in range(4):
                gpu_adamw_(master, exp_avg, exp_avg_sq, gradient, weight, _SCALARS)
            torch.cuda.synchronize(self._device)

        work()  # compiles the kernel
        return 4 * numel / _median_time(work, seconds)

    def latency(self) -> float:
        """Of small copies on two streams that wait for each other in turn."""
        small = [(target[:4096], source[:4096]) for target, source in self._pairs]
        count, found = 50, []
        for _ in range(5):
            begin = time.perf_counter()
            before: torch.cuda.Event | None = None
            for turn in range(count):
                stream = self._streams[turn % 2]
                target, source = small[turn % 2]
                if before is not None:
                    stream.wait_event(before)
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
                    before = torch.cuda.Event()
                    before.record()
            torch.cuda.synchronize(self._device)
            found.append((time.perf_counter() - begin) / count)
        return statistics.median(found)


def _done_by(ends: list[float], until: float) -> float:
    """How many of equal pieces of work, done one after the other, were done at ``until``; parts count."""
    before = 0.0
    for number, end in enumerate(ends):
        if end > until:
            return number + (until - before) / (end - before)
        before = end
    return float(len(ends))


def _adamw_tensors(numel: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ones = functools.partial(torch.ones, numel, device=device)
    return ones(), ones(), ones(), ones(), ones(dtype=torch.bfloat16)


def _median_time(work: Callable[[], Any], seconds: float) -> float:
    """Seconds of one call: the median of at least 3, for about ``seconds``."""
    times: list[float] = []
    until = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < until:
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def save_constants(path: Path, constants: Constants, device: torch.device, *, threads: int | None = None) -> None:
    """Write ``constants`` as JSON, with when, where and how they were measured.

    Raises:
        OSError: ``path`` cannot be written.
    """
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "none: copies from host to host",
        "threads": threads or torch.get_num_threads(),
        "cpu_kernel": kernel_level(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
    }
    text = json.dumps({"constants": dataclasses.asdict(constants), "measured": about}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text + "\n")
