"""The online model: the plan to begin with, and one that follows what is measured.

Every rank plans for itself: nothing that ranks do together depends on a plan. A new plan changes times, never values.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

import torch

from pretrain.config.schema import OffloadConfig
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.device import Clock, Device
from pretrain.optim.offload.device_memory import CudaMemory, Envelope, MemoryLook, free_device_bytes
from pretrain.optim.offload.drift import constants_drift, window_drift
from pretrain.optim.offload.estimate import Estimate
from pretrain.optim.offload.host_memory import available_host_bytes
from pretrain.optim.offload.memory import Shape, Storage
from pretrain.optim.offload.plan import SLOTS, make_plan
from pretrain.optim.offload.probe import probe
from pretrain.optim.offload.recorder import Recorder, StepTimes, TimedDevice
from pretrain.optim.offload.schedule import Place, Plan, update_operations
from pretrain.optim.offload.timeline import Side, link_rates, measured_side, predicted_side, write_trace
from pretrain.parallel.process import world_size

if TYPE_CHECKING:
    from pretrain.optim.offload.states import OffloadedStates

logger = logging.getLogger(__name__)

PROBE_SECONDS = {"cuda": 5.0, "cpu": 0.3}
"""By kind of device. On the host the probe only says where the running estimate begins."""
SAMPLES = 20
"""Updates at most, between two looks, that constants are re-estimated from."""
FIRST_LOOK = 5
"""Updates after which constants are looked at first: by then the passes around the update are known."""
WARM_UP = 2
"""First updates under a plan, of which times tell nothing: memory is touched first, kernels are compiled."""
GAIN = 0.02
"""Share of the exposed time that a new plan has to save."""
FIRST_RING = 0.25
"""Of the free device memory that buffers may take before it is known how much the model needs."""
_GIB = 2**30

Journal = Callable[[dict[str, Any]], None]


@functools.cache
def probed(device: torch.device, threads: int | None) -> Constants:
    """Constants of this rank, measured once per process."""
    return probe(device, seconds=PROBE_SECONDS[device.type], threads=threads)


def ranks_on_host() -> int:
    """Ranks of this run on this host, from what its launcher has set (torchrun, Slurm or our own); at most all."""
    ranks, env = world_size(), os.environ
    if "LOCAL_WORLD_SIZE" in env:
        return min(ranks, int(env["LOCAL_WORLD_SIZE"]))
    if "SLURM_NTASKS" in env and "SLURM_NNODES" in env:
        return min(ranks, -(-int(env["SLURM_NTASKS"]) // int(env["SLURM_NNODES"])))
    return ranks


def shape_widths(shape: Shape) -> Widths:
    """Bytes per element of the most common kind of weight."""
    elements: dict[tuple[Storage, int], int] = {}
    for subgroup, storage, width in zip(shape.subgroups, shape.storages, shape.weight_width, strict=True):
        elements[storage, width] = elements.get((storage, width), 0) + subgroup.numel
    storage, width = max(elements, key=lambda key: elements[key], default=(Storage.FULL, 2))
    return Widths(storage.width, shape.gradient_dtype.itemsize, width, weight_down=storage is not Storage.FULL)


def first_plan(shape: Shape, config: OffloadConfig, device: Device) -> Plan:
    """The plan of a run's first steps: from probed constants and what is free on the device now.

    How much the model will need and how long its passes are is not known yet: ``auto`` keeps nothing resident, buffers
    take a quarter of what is free, and no state moves before the update.

    Raises:
        ValueError: what the configuration asks for does not fit into device memory, with the numbers.
    """
    where = device.empty_device(1).device
    sizes = [shape.state_bytes(i) for i in range(len(shape.subgroups))]
    room = free_device_bytes(where)
    if config.fraction == "auto":
        kept = 0.0 if config.resident_fraction == "auto" else config.resident_fraction * sum(sizes)
        ring = SLOTS * max(sizes, default=0)
        room = min(room, int(kept + min(ring, FIRST_RING * max(0.0, room - kept))))
    planned = make_plan(
        shape.subgroups,
        probed(where, config.cpu_threads),
        shape_widths(shape),
        Window(device_bytes=room, host_bytes=_host_room(config, 0)),
        fraction=None if config.fraction == "auto" else config.fraction,
        resident_fraction=0.0 if config.resident_fraction == "auto" else config.resident_fraction,
        overlap=config.overlap,
    )
    logger.info("offloaded optimizer state, first plan: %s", "; ".join(planned.why))
    return planned.plan


def _host_room(config: OffloadConfig, held: int) -> int | None:
    """Host bytes that this rank's state and buffers may take in all, ``held`` of which they take now."""
    available = available_host_bytes()
    rooms = [] if available is None else [held + available // ranks_on_host()]
    if config.host_memory_gib is not None:
        rooms.append(int(config.host_memory_gib * _GIB))
    return min(rooms, default=None)


class Online:
    """A :class:`~pretrain.optim.offload.states.Watcher`: measures steps, follows the constants, plans anew.

    Set it as ``states.watcher``. It never waits for the device: what is not over yet is looked at a step later.

    Every ``replan_interval`` updates, and early on once, it compares constants, passes and memory with those that the
    plan was made from. Where one has drifted (:mod:`~pretrain.optim.offload.drift`) a plan is made anew, and taken if
    it shortens the step by :data:`GAIN` or the present one no longer fits. On the host, which runs one operation after
    the other whatever the plan, only predictions follow.

    Args:
        states: what is watched, on a device that tells times.
        constants: where the estimate begins (None: probed).
        memory: tells of device memory (None: CUDA's where the device is one).
        journal: is given every decision and why, as JSON-able fields.
        folder: for timelines (None: none are written).
        rank: names this rank's timelines.
    """

    def __init__(
        self,
        states: OffloadedStates,
        *,
        constants: Constants | None = None,
        memory: MemoryLook | None = None,
        journal: Journal | None = None,
        folder: Path | None = None,
        rank: int = 0,
    ) -> None:
        assert isinstance(states.device, Clock), "a device that tells times"
        where = states.device.empty_device(1).device
        self._states = states
        self._config = states.config
        self._is_host = states.device.host_weights
        self._widths = shape_widths(states.shape)
        self._made_from = constants or probed(where, states.config.cpu_threads)
        self._estimate = Estimate(self._made_from, states.subgroups, self._widths)
        self._memory = memory or (CudaMemory(where) if where.type == "cuda" else None)
        self._envelope = Envelope()
        self._journal = journal
        self._folder = folder
        self._rank = rank
        self._number = self._updates = self._since_plan = 0
        self._backwards: deque[float] = deque(maxlen=20)
        self._gaps: deque[float] = deque(maxlen=20)
        self._between: deque[float] = deque(maxlen=20)
        self._forward_s: float | None = None
        self._undrawn: list[tuple[int, Side, Side]] = []
        self._recorder = Recorder(cast(TimedDevice, states.device))
        self.replans = 0
        self.last: tuple[int, Side, Side] | None = None
        """Step, measured and predicted of the last update whose times are known."""
        self._made_for = self.window
        self._adopt()

    def begin(self, step: int) -> None:
        """The next update is that of training step ``step`` + 1."""
        self._number = step

    def tell_forward(self, seconds: float) -> None:
        """How long one forward pass took, where it is known better than from the time to the next backward pass."""
        self._forward_s = seconds

    def before_early(self) -> None:
        if self._memory is not None:
            self._envelope.add_before_early(self._memory(), self._lasting_bytes())
        self._recorder.before_early()

    def before_update(self) -> None:
        self.write_timelines()
        if self._memory is not None:
            self._envelope.add_before_update(self._memory(), self._lasting_bytes(), self._states.early_bytes)
        if self._states.plan != self._plan:
            self._adopt()
        self._number += 1
        self._recorder.before_update(self._number, self._plan, self._num_operations, self._predicted)

    def after_update(self, states: OffloadedStates) -> None:
        self._recorder.after_update()
        if self._memory is not None:
            self._memory()  # what the update took belongs to no phase of the model
        self._updates += 1
        self._since_plan += 1
        self._settle()
        interval = self._config.replan_interval
        if interval and (self._updates % interval == 0 or self._updates == min(interval, FIRST_LOOK)):
            self._look()

    def close(self) -> None:
        """Wait for what is under way, write what is left to be written, watch no more."""
        self._states.synchronize()
        self._settle(last=True)
        self.write_timelines()
        self._recorder.close()
        if self._states.watcher is self:
            self._states.watcher = None

    def write_timelines(self) -> None:
        """Draw what is due; some tenths of a second for each. Without it that is done before the next update."""
        due, self._undrawn = self._undrawn, []
        for number, measured, predicted in due:
            self._write(number, measured, predicted)

    @property
    def constants(self) -> Constants:
        """As they are estimated now."""
        constants = self._estimate.constants
        # On the host no operation begins while another one runs, so time that belongs to none of them shows.
        between = _median(self._between)
        return constants if between is None else replace(constants, latency=between)

    @property
    def window(self) -> Window:
        """What is known of memory and of the passes around the update."""
        forwards = [seconds for seconds in (self._forward_s, _median(self._gaps)) if seconds is not None]
        is_known = self._envelope.is_known
        return Window(
            device_bytes=self._envelope.device_bytes if is_known else self._states.device_bytes,
            early_bytes=self._envelope.early_bytes if is_known else 0,
            backward_s=_median(self._backwards) or 0.0,
            forward_s=min(forwards, default=0.0),
            host_bytes=_host_room(self._config, self._states.host_bytes),
        )

    def report(self) -> dict[str, float]:
        """Numbers of the last update whose times are known, and of the present plan, for metrics."""
        self._settle()
        fraction, resident_fraction = self._shares()
        found = {
            "offload/fraction": fraction,
            "offload/resident_fraction": resident_fraction,
            "offload/replans": float(self.replans),
            "offload/host_gib": self._states.host_bytes / _GIB,
            "offload/device_gib": 0.0 if self._is_host else self._states.device_bytes / _GIB,
        }
        if self.last is not None:
            _, measured, predicted = self.last
            up, down = link_rates(measured, self._states.subgroups, self._widths)
            found |= {
                "offload/update_s": measured.update_s,
                "offload/exposed_s": measured.exposed_s,
                "offload/predicted_s": predicted.update_s,
                "offload/error": _error(measured, predicted),
                "offload/up_gb_s": up / 1e9,
                "offload/down_gb_s": down / 1e9,
            }
        return found

    def _shares(self) -> tuple[float, float]:
        """Of the offloaded elements those updated on the device, of all elements the resident ones."""
        totals = dict.fromkeys(Place, 0)
        for subgroup, place in zip(self._states.subgroups, self._states.plan.places, strict=True):
            totals[place] += subgroup.numel
        offloaded = totals[Place.STREAM] + totals[Place.CPU]
        everything = offloaded + totals[Place.RESIDENT]
        return totals[Place.STREAM] / max(1, offloaded), totals[Place.RESIDENT] / max(1, everything)

    def _lasting_bytes(self) -> int:
        parts = self._states.shape.device_bytes(self._states.plan)
        return sum(parts.values()) - parts["early buffers"]

    def _adopt(self) -> None:
        """Begin with the plan that the states have now."""
        plan = self._plan = self._states.plan
        self._since_plan = 0
        # As the executor: where the weight holds part of the master, the host needs it.
        partly = {i for i, storage in enumerate(self._states.shape.storages) if storage is not Storage.FULL}
        program = update_operations(plan, self._states.subgroups, host_weights=self._is_host, weight_down=partly)
        sent = len(plan.cpu_order) if plan.early_gradients and not self._is_host else 0
        self._num_operations = len(program) + plan.num_early + sent
        self._predicted = self._predict()

    def _predict(self) -> Side:
        return predicted_side(
            self._plan, self._states.subgroups, self.constants, self._widths, self.window, serial=self._is_host
        )

    def _settle(self, *, last: bool = False) -> None:
        for times in self._recorder.settle(self._wants_forward, last=last):
            self._learn(times)

    def _wants_estimate(self) -> bool:
        """Not of every step: it takes the host some milliseconds."""
        interval = self._config.replan_interval
        return interval > 0 and (self._since_plan <= FIRST_LOOK or self._updates % -(-interval // SAMPLES) == 0)

    def _wants_forward(self, number: int) -> bool:
        return self._wants_timeline(number) and not self._is_host

    def _wants_timeline(self, number: int) -> bool:
        interval = self._config.timeline_interval
        return self._folder is not None and interval > 0 and number % interval == 0

    def _learn(self, times: StepTimes) -> None:
        if times.backward_s is not None:
            self._backwards.append(times.backward_s)
        if times.gap_s is not None:
            self._gaps.append(times.gap_s)
        measured = measured_side(times.operations, times.phases, times.update_s, self.window.forward_s)
        self.last = times.number, measured, times.predicted
        if self._since_plan > WARM_UP and self._wants_estimate():
            self._estimate.add(times.operations)
        own = [timed.end - timed.start for timed in times.operations if timed.start >= 0]
        if self._is_host and own:
            self._between.append(max(0.0, times.update_s - sum(own)) / len(own))
        if self._wants_timeline(times.number):
            self._undrawn.append(self.last)

    def _write(self, number: int, measured: Side, predicted: Side) -> None:
        from pretrain.optim.offload.timeline_plot import plot_timeline

        assert self._folder is not None
        sides, path = [measured, predicted], self._folder / f"step_{number}_rank_{self._rank}.json"
        write_trace(path, sides, self._states.subgroups, self._widths, rank=self._rank, step=number)
        fraction, resident_fraction = self._shares()
        title = (
            f"Optimizer update of step {number}, rank {self._rank}: {resident_fraction:.0%} of the state resident, of "
            f"the rest {fraction:.0%} updated on the device; {_error(measured, predicted):+.1%} against prediction"
        )
        plot_timeline(path.with_suffix(".png"), sides, title=title)

    def _look(self) -> None:
        """Compare what holds now with what the plan was made from."""
        constants, window = self.constants, self.window
        largest = max((self._states.shape.state_bytes(i) for i in range(len(self._plan.places))), default=0)
        reasons = constants_drift(self._made_from, constants)
        if not self._is_host:
            reasons += window_drift(self._made_for, window, update_s=self._predicted.update_s, unit_bytes=largest)
            if reasons:
                self._reconsider(constants, window, reasons)
        if reasons:
            self._made_from, self._made_for = constants, window
        self._predicted = self._predict()

    def _reconsider(self, constants: Constants, window: Window, reasons: list[str]) -> None:
        """Make a plan anew and take it if that is worth it."""
        config = self._config
        present = predicted_side(self._plan, self._states.subgroups, constants, self._widths, window)
        told = {"step": self._number, "reasons": reasons, "before_s": present.exposed_s, "fraction": self._shares()[0]}
        try:
            planned = make_plan(
                self._states.subgroups,
                constants,
                self._widths,
                window,
                fraction=None if config.fraction == "auto" else config.fraction,
                resident_fraction=None if config.resident_fraction == "auto" else config.resident_fraction,
                overlap=config.overlap,
            )
            is_better = planned.timeline.exposed_s < (1 - GAIN) * present.exposed_s
            fits = self._lasting_bytes() <= window.device_bytes
            if self._states.adapted(planned.plan) == self._plan or (fits and not is_better):
                self._tell({**told, "changed": False, "after_s": present.exposed_s})
                return
            self._states.replan(planned.plan)
        except (ValueError, torch.OutOfMemoryError) as error:  # no room for it: the plan is as it was
            self._tell({**told, "changed": False, "after_s": present.exposed_s, "error": str(error)})
            return
        self.replans += 1
        self._adopt()
        self._tell(
            {
                **told,
                "changed": True,
                "after_s": planned.timeline.exposed_s,
                "fraction": planned.fraction,
                "resident_fraction": planned.resident_fraction,
                "plan": list(planned.why),
            }
        )

    def _tell(self, fields: dict[str, Any]) -> None:
        logger.info("offloaded optimizer state: %s", fields)
        if self._journal is not None:
            self._journal(fields)


def _median(values: deque[float]) -> float | None:
    return median(values) if values else None


def _error(measured: Side, predicted: Side) -> float:
    return measured.update_s / predicted.update_s - 1 if predicted.update_s else 0.0
