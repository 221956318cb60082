"""One arm, size and number of tokens in a process of its own: ``python cell.py ORDER.json RESULT.json``.

The result is written also when the arm fails, with the reason; a process that is killed writes none.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

OUT_OF_DEVICE_MEMORY = "out of device memory"
OUT_OF_HOST_MEMORY = "out of host memory"


@dataclass(frozen=True)
class Order:
    """What to run. ``device_gib``: device memory to leave to the arm, None for all of it."""

    arm: str
    size: str
    tokens: int
    micro_tokens: int
    steps: int
    warmup: int
    seed: int
    device_gib: float | None = None
    ratio: float | None = None


def main() -> None:
    order = Order(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = {"status": "measured", **run(order)}
    except BaseException as error:
        traceback.print_exc()
        result = {"status": "failed", "reason": reason_of(error)}
    Path(sys.argv[2]).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: libraries that failed half-way may hang there.
    os._exit(0)


def run(order: Order) -> dict[str, Any]:
    import torch

    from offload import drivers
    from offload.arms import ARMS
    from offload.measure import Laps, own_peak_host_bytes, traced_copies
    from offload.sizes import SIZES
    from offload.work import batches

    arm, size = ARMS[order.arm], SIZES[order.size]
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    ballast = _ballast(order.device_gib, device) if on_gpu else None
    driver = drivers.build_driver(arm, size, order.tokens, order.micro_tokens, device, order.seed, order.ratio)
    data = batches(size, order.tokens, order.micro_tokens, device, order.seed)
    losses: list[Any] = []
    warmup = max(order.warmup, arm.min_warmup)
    for _ in range(warmup):
        losses.append(driver.step(next(data), Laps(device)))
    driver.finish()
    laps = Laps(device)
    updates: dict[int, tuple[float, float]] = {}
    # One step more than asked for ends the last iteration.
    for _ in range(order.steps + 1):
        losses.append(driver.step(next(data), laps))
        updates |= update_known(driver.states)
    driver.finish()
    times = {name: values[: order.steps] for name, values in laps.milliseconds().items()}
    result: dict[str, Any] = {
        "milliseconds": times,
        "losses": [float(loss) for loss in losses],
        "warmup": warmup,
        # Times of an update are known a step or two later.
        "predicted_and_actual_ms": [found for number, found in sorted(updates.items()) if number > warmup],
        "peak_host_bytes": own_peak_host_bytes(),
        "ratio": order.ratio,
        "function_check": not on_gpu,
    }
    if on_gpu:
        from pretrain.parallel.peak_memory import peak_bytes

        held = 0 if ballast is None else ballast.numel()
        result["peak_device_bytes"] = peak_bytes(device) - held
    if (states := driver.states) is not None:
        result |= described(states)
    if on_gpu:
        # What was measured stands, whatever the profiler makes of it.
        try:
            result["copies"] = traced_copies(lambda: _whole_step(driver, next(data), Laps(device)))
        except Exception as error:
            result |= {"copies": None, "copies_failed": reason_of(error)}
    drivers.leave()
    return result


def _whole_step(driver: Any, micro_batches: Any, laps: Any) -> None:
    driver.step(micro_batches, laps)
    driver.finish()


def update_known(states: Any) -> dict[int, tuple[float, float]]:
    """By its number the exposed milliseconds of an update, predicted and actual, as the online model knows them: the
    gradients' norm is not among them."""
    last = getattr(getattr(states, "watcher", None), "last", None)
    return {} if last is None else {last[0]: (1e3 * last[2].exposed_s, 1e3 * last[1].exposed_s)}


def described(states: Any) -> dict[str, Any]:
    """The plan of one of ours, and the bytes that it moves and takes."""
    from pretrain.optim.offload.schedule import Place

    plan, shape = states.plan, states.shape
    elements = dict.fromkeys(Place, 0)
    moved = {"up": 0, "down": 0}
    for number, place in enumerate(plan.places):
        numel = shape.subgroups[number].numel
        elements[place] += numel
        if place is Place.STREAM:
            moved["up"] += shape.state_bytes(number)
            moved["down"] += shape.state_bytes(number)
        elif place is Place.CPU:
            weights = numel * shape.weight_width[number]
            moved["up"] += weights
            moved["down"] += numel * shape.gradient_dtype.itemsize
            if shape.storages[number].width < 12:
                moved["down"] += weights
    return {
        "plan": {
            "subgroups": len(plan.places),
            "elements": {place.value: count for place, count in elements.items()},
            "num_slots": plan.num_slots,
            "num_early": plan.num_early,
            "early_gradients": plan.early_gradients,
            "bytes_moved": moved,
        },
        "state_host_bytes": states.host_bytes,
        "state_device_bytes": states.device_bytes,
        "offload": asdict(states.config),
        "report": states.watcher.report() if states.watcher is not None else {},
    }


def reason_of(error: BaseException) -> str:
    """A failure in one line, memory and refusals told apart."""
    import torch

    text = " ".join(str(error).split()) or type(error).__name__
    short = text if len(text) <= 300 else text[:297] + "..."
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return f"{OUT_OF_DEVICE_MEMORY}: {short}"
    if isinstance(error, MemoryError) or "optimizer.offload needs more host memory" in text:
        return f"{OUT_OF_HOST_MEMORY}: {short}"
    if isinstance(error, RuntimeError) and "out of memory" in text.lower():
        # Of CUDA outside torch's allocator, or while pinning.
        pinning = "host" in text.lower() or "pin" in text.lower()
        return f"{OUT_OF_HOST_MEMORY if pinning else OUT_OF_DEVICE_MEMORY}: {short}"
    if isinstance(error, NotImplementedError | ImportError):
        return f"not supported: {short}"
    if isinstance(error, ValueError | AssertionError):
        return f"refused: {short}"
    return f"failed: {type(error).__name__}: {short}"


def _ballast(device_gib: float | None, device: Any) -> Any:
    """What is taken away from the device's memory so that ``device_gib`` are left."""
    import torch

    if device_gib is None:
        return None
    free, _ = torch.cuda.mem_get_info(device)
    size = free - int(device_gib * 2**30)
    if size <= 0:
        raise ValueError(f"--device-gib {device_gib}: the device has {free / 2**30:.1f} GiB free, expected more")
    return torch.empty(size, dtype=torch.uint8, device=device)


if __name__ == "__main__":
    main()
