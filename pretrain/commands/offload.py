"""``pretrain offload``: where optimizer state would be updated and what it takes; rates of this machine; its kernel."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.config.ranges import MOST_THREADS
from pretrain.optim.offload.arguments import count, positive

if TYPE_CHECKING:
    from pretrain.config.check import Judgement
    from pretrain.planning.offload import Outcome

NO_KERNEL = 1
_PLAN = "compute where each subgroup would be updated on a GPU, the memory and the time of it, without any tensor"
_ENABLED = "optimizer.offload.enabled"
_LETTERS = {"stream": "S", "cpu": "C", "resident": "R"}
_MEANING = {
    "stream": "brought to the device, updated there, brought back",
    "cpu": "updated by the CPU",
    "resident": "stays on the device",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the ``offload`` verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{plan,probe,kernel}")
    plan = actions.add_parser("plan", help=_PLAN, description=_PLAN)
    plan.add_argument("overrides", nargs="*", help="a run directory, or group=option and key.path=value")
    plan.add_argument("--config-dir", help="a folder of your own config groups, searched before the shipped one")
    plan.add_argument(
        "--parameters", type=count, metavar="N", help="trained weights, instead of those of the model: 8e9"
    )
    plan.add_argument(
        "--constants",
        metavar="FILE",
        help="rates: a file of `pretrain offload probe --save`, or the name of stated ones",
    )
    plan.add_argument("--device-memory", type=positive, metavar="GIB", help="of a device (default: room for 3 buffers)")
    plan.add_argument(
        "--activations", type=positive, metavar="GIB", default=20.0, help="at their peak (default: %(default)g)"
    )
    plan.add_argument("--tokens", type=count, metavar="N", default=0, help="of a rank's last micro-batch (default: 0)")
    plan.add_argument(
        "--tflops", type=positive, metavar="N", default=400.0, help="of the model on a device (default: %(default)g)"
    )
    plan.add_argument("--subgroups", action="store_true", help="print a line for each subgroup")
    plan.add_argument("--json", action="store_true", help="print exact numbers as JSON")
    text = "measure the rates that plans are computed from: link, CPU update, device update"
    probe = actions.add_parser("probe", help=text, description=text)
    probe.add_argument("--device", help="cpu, cuda or cuda:N (default: the first GPU, else cpu)")
    probe.add_argument("--threads", type=_threads, metavar="N", help="of the CPU's update (default: as torch has)")
    probe.add_argument("--seconds", type=positive, default=5.0, help="time to spend, about (default: %(default)g)")
    probe.add_argument(
        "--save", metavar="FILE", help="write them as JSON, for `pretrain offload plan --constants FILE`"
    )
    probe.add_argument("--json", action="store_true", help="print the constants as JSON")
    text = "build the compiled CPU update and say which level of it runs on this machine, or why none does"
    kernel = actions.add_parser("kernel", help=text, description=text)
    kernel.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: Namespace) -> int:
    """Run the verb; 0, 1 where there is no compiled kernel, or 2 for what cannot be."""
    from pretrain.training.failure import guarded

    actions = {"plan": _plan, "probe": _probe, "kernel": _kernel}
    return guarded(lambda: actions[args.action](args))


def _plan(args: Namespace) -> int:
    from pretrain.optim.offload.predict import DEFAULT_CONSTANTS
    from pretrain.planning.offload import GIB, Device, case_of, load_constants, outcome, to_json, window_of

    name = DEFAULT_CONSTANTS if args.constants is None else args.constants
    constants, source = load_constants(name)
    case = case_of(_judged(args), args.parameters)
    device = None
    if args.device_memory is not None:
        memory, activations = int(args.device_memory * GIB), int(args.activations * GIB)
        device = Device(memory, activations, args.tokens, args.tflops * 1e12)
    found = outcome(case, constants, window_of(case, device))
    if args.json:
        print(json.dumps(to_json(found, f"{name}: {source}"), indent=1))
    else:
        print("\n".join(_shown(found, f"{name}, {source}", args.subgroups)))
    return 0


def _judged(args: Namespace) -> Judgement:
    """The configuration with offloading on, judged; faults are in the judgement."""
    from pretrain.config.check import judge
    from pretrain.config.compose import compose_leniently, parse_override, resolve_paths
    from pretrain.config.freeze import extend

    overrides = list(args.overrides)
    is_run = bool(overrides) and "=" not in overrides[0]
    if is_run and not os.path.isdir(overrides[0]):
        raise ValueError(
            f"{overrides[0]}: no such folder; expected a run directory, or group=option and key.path=value"
        )
    for override in overrides[is_run:]:
        parse_override(override)
    if not any(override.startswith(_ENABLED) for override in overrides):
        overrides.append(f"{_ENABLED}=true")
    if is_run:
        from launchers.run_dir import RunDir

        tree, _ = extend(RunDir.open(overrides[0]).config(), overrides[1:])
        return judge(tree)
    composition = compose_leniently(overrides, args.config_dir)
    return judge(resolve_paths(composition.tree, os.getcwd()), composition.violations)


def _shown(found: Outcome, source: str, each: bool) -> Iterator[str]:
    from pretrain.planning.offload import STOCK_BYTES, subgroup_rows
    from pretrain.planning.preflight.units import amount, duration, size

    case, planned, rows = found.case, found.planned, list(subgroup_rows(found))
    yield (
        f"{amount(case.parameters)} parameters on {case.ranks} rank{'s' * (case.ranks > 1)}; a rank updates"
        f" {case.elements:,} in {len(rows)} subgroups, with {case.widths.state} bytes of state each ({case.precision})"
    )
    yield f"rates: {source}"
    yield ""
    yield f"places: {''.join(_LETTERS[row['place']] for row in rows)}"
    for place, letter in _LETTERS.items():
        held = [row["elements"] for row in rows if row["place"] == place]
        if held:
            share = sum(held) / case.elements
            yield f"  {letter}  {len(held):>5} subgroups  {sum(held):>16,} elements  {share:6.1%}  {_MEANING[place]}"
    plan = planned.plan
    when = "as they become final" if plan.early_gradients else "in the update"
    yield (
        f"  {plan.num_slots} device buffers; {plan.num_early} subgroups come early, in the last backward pass; "
        + (f"gradients of C go to the host {when}" if plan.cpu_order else "no gradient goes to the host")
    )
    if each:
        yield ""
        yield f"  {'subgroup':>8}  {'elements':>13}  {'state':>9}  place     turn  buffer"
        for row in rows:
            buffer = "-" if row["buffer"] is None else f"{row['buffer']}{' early' if row['early'] else ''}"
            yield (
                f"  {row['subgroup']:>8}  {row['elements']:>13,}  {size(row['state_bytes']):>9}  {row['place']:<8}"
                f"  {row['turn']:>4}  {buffer}"
            )
    yield ""
    yield "memory of a rank"
    yield _memory("host", found.arm.host)
    yield _memory("device", found.arm.device)
    if case.on_node > 1:
        yield f"  {case.on_node} ranks on a node take {size(case.on_node * sum(found.arm.host.values()))} of its host"
    if case.precision == "bf16":
        yield f"  DeepSpeed's own offload takes {size(STOCK_BYTES * case.elements)} of the host for a rank"
    yield ""
    yield "predicted from these rates, not measured: seconds that a step takes longer for the update"
    for arm in found.prediction.arms:
        mark = "->" if arm is found.arm else "  "
        if arm.planned is None:
            yield f"  {mark} {arm.name:<20} does not fit: {arm.problem}"
            continue
        seconds = arm.planned.timeline.exposed_s
        yield (
            f"  {mark} {arm.name:<20} {duration(seconds):>8}  at least {duration(arm.bound_s):>8}"
            f"  {arm.planned.fraction:6.1%} on the device"
        )
    timeline = planned.timeline
    yield f"  over the link: {size(timeline.up_bytes)} up, {size(timeline.down_bytes)} down"


def _memory(where: str, parts: Mapping[str, int]) -> str:
    from pretrain.planning.preflight.units import size

    listed = ", ".join(f"{name} {size(taken)}" for name, taken in parts.items() if taken)
    return f"  {where:<6} {size(sum(parts.values())):>9}" + (f"  ({listed})" if listed else "")


def _kernel(args: Namespace) -> int:
    from pretrain.optim.offload.cpu_adamw import LEVELS, TORCH_LEVEL
    from pretrain.optim.offload.kernel_build import KernelUnavailable, find_compiler, load

    answer: dict[str, Any] = {"level": TORCH_LEVEL, "library": None, "compiler": None, "reason": None}
    try:
        answer["compiler"] = " ".join(find_compiler())
        library = load()
    except KernelUnavailable as reason:
        answer["reason"] = str(reason)
    else:
        answer["library"] = library._name
        answer["level"] = LEVELS[library.adamw_best_level()]
    if args.json:
        print(json.dumps(answer, indent=1))
    elif answer["reason"] is None:
        print(f"level     {answer['level']}\nlibrary   {answer['library']}\ncompiler  {answer['compiler']}")
    else:
        print(f"no compiled kernel: {answer['reason']}", file=sys.stderr)
        print("level     torch (the same numbers, several times slower)")
    return 0 if answer["reason"] is None else NO_KERNEL


def _probe(args: Namespace) -> int:
    from dataclasses import asdict

    import torch

    from pretrain.optim.offload.probe import probe, save_constants

    device = _device(torch.cuda.is_available(), torch.cuda.device_count(), args.device)
    if args.save is not None:
        _check_writable(Path(args.save))
    constants = probe(torch.device(device), seconds=args.seconds, threads=args.threads)
    if args.save is not None:
        save_constants(Path(args.save), constants, torch.device(device), threads=args.threads)
    if args.json:
        print(json.dumps({"device": device, **asdict(constants)}, indent=1))
        return 0
    if device == "cpu":
        print("no GPU: copies from host to host stand for the link, and say nothing of any GPU's")
    for name, value in asdict(constants).items():
        number, unit = _scales()[name]
        print(f"  {name:<18} {value / number:8.2f} {unit}")
    return 0


def _device(has_gpu: bool, count: int, asked: str | None) -> str:
    """The name of the device to measure.

    Raises:
        ValueError: there is none like the one that was asked for.
    """
    if asked is None:
        return "cuda:0" if has_gpu else "cpu"
    kind, _, number = asked.partition(":")
    if kind == "cpu" and not number:
        return asked
    if kind != "cuda" or (number and not number.isdigit()):
        raise ValueError(f"--device {asked}: expected cpu, cuda or cuda:N")
    if not has_gpu or int(number or 0) >= count:
        raise ValueError(f"--device {asked}: this machine has {count} GPUs; leave it out, or name one of them")
    return f"cuda:{number or 0}"


def _scales() -> dict[str, tuple[float, str]]:
    """How rates are shown: (divisor, unit)."""
    link, update = (1e9, "GB/s"), (1e9, "Gparam/s")
    return {
        "h2d": link,
        "d2h": link,
        "h2d_duplex": (1e9, "GB/s, while the other way is busy too"),
        "d2h_duplex": (1e9, "GB/s, while the other way is busy too"),
        "link_with_cpu": (1.0, "of these while the CPU updates"),
        "cpu_adam": update,
        "cpu_adam_with_link": (1e9, "Gparam/s while both ways are busy"),
        "gpu_adam": update,
        "latency": (1e-6, "us for an operation"),
    }


def _threads(text: str) -> int:
    value = count(text)
    if value > MOST_THREADS:
        raise ArgumentTypeError(f"found {text}, expected at most {MOST_THREADS} threads on this machine")
    return value


def _check_writable(path: Path) -> None:
    """Make the folder of ``path``, before anything is measured.

    Raises:
        ValueError: a file cannot be written there.
    """
    found = None
    if path.is_dir() or not path.name:
        found = "is a folder"
    else:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            found = f"its folder cannot be made ({error.strerror})"
        else:
            if not os.access(path.parent, os.W_OK | os.X_OK):
                found = "its folder cannot be written"
    if found is not None:
        raise ValueError(f"--save {path}: {found}; expected the name of a file in a folder that can be written")
