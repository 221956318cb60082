"""A run's optimizer state on paper: subgroups of a rank, their plan, its memory, its predicted time. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from pretrain.config.check import Judgement
from pretrain.config.launch_schema import SlurmConfig
from pretrain.config.layout import data_parallel_size, model_parallel_size
from pretrain.config.schema import Config, DeepSpeedConfig, OffloadConfig, OptimizerConfig
from pretrain.config.violation import InvalidConfigError
from pretrain.optim.offload.arguments import check_number
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.constants_file import read_constants
from pretrain.optim.offload.host_memory import widths_of
from pretrain.optim.offload.plan import SLOTS, Planned
from pretrain.optim.offload.predict import STATED, SUMMED, Arm, Prediction, predict
from pretrain.optim.offload.schedule import Place

GIB: Final = 2**30
STOCK_BYTES: Final = 18
"""Host bytes per element of DeepSpeed's own offload of optimizer states in bf16: FP32 master, two moments and gradient,
and a BF16 copy."""
PUBLISHED: Final = "published-h100"
STATED_NAMES: Final = (*STATED, PUBLISHED)
_NODES: Final = ("optimizer", "engine", "train", "launcher")


@dataclass(frozen=True)
class Case:
    """A run's trained ``parameters`` over its ``ranks``, ``on_node`` of them on the fullest node. A rank computes with
    ``part`` of them, updates ``elements``, and keeps ``weights`` and ``gradients`` on its device (all are counts)."""

    parameters: int
    ranks: int
    on_node: int
    data_parallel: int
    part: int
    weights: int
    gradients: int
    precision: str
    offload: OffloadConfig

    @property
    def elements(self) -> int:
        return -(-self.part // self.data_parallel)

    @property
    def widths(self) -> Widths:
        return widths_of(self.precision, self.offload.master)


@dataclass(frozen=True)
class Device:
    """What is known of a rank's device: ``memory`` and the peak of ``activations`` in bytes, ``tokens`` of the last
    micro-batch, ``flops`` operations/s of the model's passes."""

    memory: int
    activations: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Outcome:
    """The plan of a case (``arm``), among other ways to offload."""

    case: Case
    constants: Constants
    window: Window
    prediction: Prediction
    arm: Arm

    @property
    def planned(self) -> Planned:
        assert self.arm.planned is not None
        return self.arm.planned


def case_of(judgement: Judgement, parameters: int | None) -> Case:
    """The case of a judged configuration; ``parameters``: instead of those of its model.

    Faults in nodes that do not matter here, such as data that is not prepared, are passed over.

    Raises:
        InvalidConfigError: with the faults of the nodes that matter.
        ValueError: the model states no number of parameters.
    """
    nodes = _NODES if parameters is not None else (*_NODES, "model")
    # What is no node of a configuration is a mistake in writing.
    passed_over = {f.name for f in fields(Config)} - set(nodes)
    faults = [v for v in judgement.violations if v.path.partition(".")[0].partition("[")[0] not in passed_over]
    if faults:
        raise InvalidConfigError(faults)
    config = judgement.config
    if parameters is None:
        parameters = _parameters(config.model)
    assert isinstance(config.optimizer, OptimizerConfig)  # muon has no such block, which the check has said
    engine, ranks = config.engine, config.launcher.num_processes
    num_nodes = config.launcher.num_nodes if isinstance(config.launcher, SlurmConfig) else 1
    data_parallel = data_parallel_size(config)
    part = -(-parameters // model_parallel_size(engine))
    stage = engine.zero_stage if isinstance(engine, DeepSpeedConfig) else 1
    return Case(
        parameters=parameters,
        ranks=ranks,
        on_node=-(-ranks // num_nodes),
        data_parallel=data_parallel,
        part=part,
        weights=-(-part // data_parallel) if stage == 3 else part,
        gradients=-(-part // data_parallel) if stage >= 2 else part,
        precision=config.train.precision,
        offload=config.optimizer.offload,
    )


def _parameters(model: Any) -> int:
    from pretrain.models.hybrid.config import HybridConfig

    if not isinstance(model, HybridConfig):
        found = type(model).__name__
        raise ValueError(f"model: {found} states no number of parameters; give it with --parameters 8e9")
    from pretrain.models.hybrid.cost import model_cost

    return model_cost(model, 1).parameters


def window_of(case: Case, device: Device | None) -> Window:
    """Memory and time around the update. Without a device: three buffers, the resident share, and nothing hidden.

    What activations leave free is free all the time; their memory is free in the second half of the last backward pass.

    Raises:
        ValueError: weights, gradients and activations do not fit on the device.
    """
    limit = case.offload.host_memory_gib
    host_bytes = None if limit is None else int(limit * GIB)
    if device is None:
        resident = case.offload.resident_fraction
        largest = min(case.offload.subgroup_size, case.elements)
        # Residents are whole subgroups: the nearest number of them may be half a one more.
        kept = 0 if isinstance(resident, str) or not resident else int(resident * case.elements) + largest // 2 + 1
        held = SLOTS * largest + min(kept, case.elements)
        return Window(device_bytes=held * case.widths.state, host_bytes=host_bytes)
    weights, gradients = case.weights * case.widths.weight, case.gradients * SUMMED
    free = device.memory - weights - gradients - device.activations
    if free < 0:
        raise ValueError(
            f"a device of {device.memory / GIB:.1f} GiB does not hold weights ({weights / GIB:.1f} GiB), gradients"
            f" ({gradients / GIB:.1f} GiB) and activations ({device.activations / GIB:.1f} GiB): use more ranks,"
            " a higher engine.zero_stage, tensor or pipeline parallelism, or smaller micro-batches"
        )
    # Two operations for a parameter and token forward, four backward.
    forward_s = 2 * case.part * device.tokens / device.flops
    return Window(free, device.activations, forward_s, forward_s, host_bytes)


def outcome(case: Case, constants: Constants, window: Window) -> Outcome:
    """Plan the case as a run on GPUs would, with ``constants`` instead of rates measured at its start.

    Raises:
        ValueError: memory does not hold what was asked for, with the numbers.
    """
    offload = case.offload
    check_number(case.elements, offload.subgroup_size)
    prediction = predict(
        {"weights": (1, case.part)},
        constants,
        window,
        data_parallel=case.data_parallel,
        subgroup_size=offload.subgroup_size,
        widths=case.widths,
        resident_fraction=_share(offload.resident_fraction),
        fraction=_share(offload.fraction),
    )
    arm = prediction.arms[-1 if offload.overlap else -2]
    if arm.planned is None:
        raise ValueError(f"no plan: {arm.problem}")
    return Outcome(case, constants, window, prediction, arm)


def _share(value: str | float) -> float | None:
    return None if isinstance(value, str) else float(value)


def load_constants(name: str) -> tuple[Constants, str]:
    """Rates by name, and where they come from: a JSON file of ``pretrain offload probe --save``, or stated ones.

    Raises:
        ValueError: no such file, or it does not hold them.
    """
    if name in STATED:
        return STATED[name], "stated, not measured"
    if name == PUBLISHED:
        from pretrain.optim.offload.published import fitted_with_slowdown

        source = "fitted to figures that others published for 4 H100 of one node, not measured on this machine"
        return fitted_with_slowdown().constants(), source
    try:
        constants, about = read_constants(Path(name))
    except OSError as error:
        raise ValueError(
            f"--constants {name or repr(name)}: {error.strerror}; expected a file of"
            f" `pretrain offload probe --save FILE`, or one of {', '.join(STATED_NAMES)}"
        ) from error
    measured = [str(about[key]) for key in ("host", "device", "date") if key in about]
    return constants, f"measured ({', '.join(measured)})" if measured else "from a file"


def to_json(found: Outcome, source: str) -> dict[str, Any]:
    """Exact numbers: bytes, seconds, elements; orders are subgroups by number."""
    case, plan, timeline = found.case, found.planned.plan, found.planned.timeline
    return {
        **asdict(case),
        "elements": case.elements,
        "widths": asdict(case.widths),
        "constants": asdict(found.constants),
        "constants_source": source,
        "window": asdict(found.window),
        "subgroups": list(subgroup_rows(found)),
        "fraction": found.planned.fraction,
        "resident_fraction": found.planned.resident_fraction,
        "device_order": list(plan.device_order),
        "cpu_order": list(plan.cpu_order),
        "buffers": plan.num_slots,
        "early_prefetches": plan.num_early,
        "early_gradients": plan.early_gradients,
        "host_bytes": dict(found.arm.host),
        "device_bytes": dict(found.arm.device),
        "stock_host_bytes": STOCK_BYTES * case.elements if case.precision == "bf16" else None,
        "predicted": {
            "update_s": timeline.update_s,
            "exposed_s": timeline.exposed_s,
            "bound_s": found.arm.bound_s,
            "up_bytes": timeline.up_bytes,
            "down_bytes": timeline.down_bytes,
            "busy": {queue.value: share for queue, share in timeline.busy.items()},
        },
        "other_ways": {
            arm.name: {"exposed_s": arm.planned.timeline.exposed_s, "fraction": arm.planned.fraction}
            if arm.planned is not None
            else {"problem": arm.problem}
            for arm in found.prediction.arms
        },
        "why": list(found.planned.why),
    }


def subgroup_rows(found: Outcome) -> Iterator[dict[str, Any]]:
    """Each subgroup: its elements, bytes of state, place, turn there, and the device buffer it passes through."""
    plan = found.planned.plan
    device = {subgroup: turn for turn, subgroup in enumerate(plan.device_order)}
    cpu = {subgroup: turn for turn, subgroup in enumerate(plan.cpu_order)}
    streamed = {subgroup: turn for turn, subgroup in enumerate(plan.streamed)}
    for subgroup in found.prediction.subgroups:
        place = plan.places[subgroup.index]
        turn = streamed.get(subgroup.index)
        yield {
            "subgroup": subgroup.index,
            "elements": subgroup.numel,
            "state_bytes": subgroup.numel * found.case.widths.state,
            "place": place.value,
            "turn": (cpu if place is Place.CPU else device)[subgroup.index],
            "buffer": None if turn is None else plan.slot(turn),
            "early": turn is not None and turn < plan.num_early,
        }
