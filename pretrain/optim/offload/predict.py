"""What offloading would take and cost for a model, from its shapes alone. Torch-free; allocates nothing.

``python -m pretrain.optim.offload.predict --model llama-3.1-8b`` prints the subgroups of a rank, host and device memory
by part, and the predicted update of every way to offload. Predictions hold as far as the constants do. Those of
:data:`STATED` are stated by others or follow from data sheets; none is a measurement. Measured ones come
from the probe.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from pretrain.optim.offload.arguments import check_number, count, positive, share
from pretrain.optim.offload.bounds import lower_bound
from pretrain.optim.offload.constants import Constants, Widths, Window
from pretrain.optim.offload.plan import Planned, make_plan
from pretrain.optim.offload.schedule import Place
from pretrain.optim.offload.sizes import device_parts, host_parts
from pretrain.optim.offload.subgroups import Subgroup, Target, cut_subgroups

GIB = 2**30
# Bytes of a weight, and of a gradient on the device: both engines sum gradients in FP32.
BF16, SUMMED = 2, 4

# "52 GB/s" each way and both at once on PCIe 5 and the CPU rates of 1, 2 and 3 Gparam/s: a projection of the update's
# time that was stated, not measured. The CPU's slowdown under transfers is what its fractions imply (about 1.3). The
# device: 4.8 TB/s of an H200's data sheet over 30 bytes an element.
STATED = {
    f"h200-pcie5-cpu{rate}": Constants(
        h2d=52e9,
        d2h=52e9,
        h2d_duplex=52e9,
        d2h_duplex=52e9,
        link_with_cpu=1.0,
        cpu_adam=rate * 1e9,
        cpu_adam_with_link=rate * 1e9 / 1.3,
        gpu_adam=160e9,
    )
    for rate in (1, 2, 3)
}
DEFAULT_CONSTANTS = "h200-pcie5-cpu2"


@dataclass(frozen=True)
class Architecture:
    """Dimensions of a transformer. ``gated``: three matrices in the MLP; ``biased``: linears and norms have biases."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    gated: bool
    biased: bool


ARCHITECTURES = {
    "llama-3.1-8b": Architecture(4096, 32, 14336, 32, 8, 128256, gated=True, biased=False),
    "gpt-neox-20b": Architecture(6144, 44, 24576, 64, 64, 50432, gated=False, biased=True),
    "llama-3.1-70b": Architecture(8192, 80, 28672, 64, 8, 128256, gated=True, biased=False),
}

Shapes = Mapping[str, tuple[int, ...]]


def architecture_shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Parameter shapes by name; embedding and head are not tied."""
    hidden, ffn = model.hidden, model.ffn
    head = hidden // model.heads
    linears = {
        "attention.qkv": ((model.heads + 2 * model.kv_heads) * head, hidden),
        "attention.out": (hidden, hidden),
        "mlp.up": (ffn, hidden),
        "mlp.down": (hidden, ffn),
    }
    if model.gated:
        linears["mlp.gate"] = (ffn, hidden)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (model.vocabulary, hidden)}

    def add_norm(name: str) -> None:
        shapes[f"{name}.weight"] = (hidden,)
        if model.biased:
            shapes[f"{name}.bias"] = (hidden,)

    for layer in range(model.layers):
        for name, shape in linears.items():
            shapes[f"layers.{layer}.{name}.weight"] = shape
            if model.biased:
                shapes[f"layers.{layer}.{name}.bias"] = shape[:1]
        add_norm(f"layers.{layer}.norm1")
        add_norm(f"layers.{layer}.norm2")
    add_norm("norm")
    shapes["head.weight"] = (model.vocabulary, hidden)
    return shapes


def rank_targets(shapes: Shapes, data_parallel: int) -> list[Target]:
    """A rank's shard of every parameter, padded to equal shards. Group 0 decays, group 1 (vectors) does not.

    Raises:
        ValueError: ``data_parallel`` is not positive.
    """
    if data_parallel < 1:
        raise ValueError(f"data_parallel is {data_parallel}, expected 1 or more")
    return [Target(ceil(prod(shape) / data_parallel), 0 if len(shape) > 1 else 1) for shape in shapes.values()]


@dataclass(frozen=True)
class Arm:
    """One way to offload. ``planned`` is None where it does not fit, ``problem`` says then why."""

    name: str
    planned: Planned | None
    problem: str
    bound_s: float
    host: Mapping[str, int]
    device: Mapping[str, int]


@dataclass(frozen=True)
class Prediction:
    """``parameters``: of the model; ``subgroups``: of a rank; one arm for each way to offload."""

    parameters: int
    subgroups: tuple[Subgroup, ...]
    widths: Widths
    window: Window
    arms: tuple[Arm, ...]

    def lines(self) -> Iterator[str]:
        """The prediction as text."""
        elements = sum(subgroup.numel for subgroup in self.subgroups)
        yield f"{self.parameters:,} parameters, {elements:,} on a rank in {len(self.subgroups)} subgroups:"
        for (group, numel), number in sorted(Counter((s.group, s.numel) for s in self.subgroups).items()):
            state = numel * self.widths.state / GIB
            yield f"  {number:5} x {numel:,} elements (group {group}), {state:.2f} GiB of state"
        yield (
            f"device memory: {self.window.device_bytes / GIB:.1f} GiB for buffers, {self.window.early_bytes / GIB:.1f} "
            f"GiB in the last backward pass; hidden: {self.window.backward_s:.2f} s of it, "
            f"{self.window.forward_s:.2f} s of the next forward pass"
        )
        yield "seconds: update until weights are new, exposed in the step, no plan of this share below"
        for arm in self.arms:
            if arm.planned is None:
                yield f"  {arm.name:<22} does not fit: {arm.problem}"
                continue
            timeline = arm.planned.timeline
            yield (
                f"  {arm.name:<22} device {arm.planned.fraction:6.1%}  resident {arm.planned.resident_fraction:5.1%}  "
                f"update {timeline.update_s:7.3f}  exposed {timeline.exposed_s:7.3f}  bound {arm.bound_s:7.3f}"
            )
            yield f"    host   {_parts(arm.host)}"
            yield f"    device {_parts(arm.device)}"


def predict(
    shapes: Shapes,
    constants: Constants,
    window: Window,
    *,
    data_parallel: int = 1,
    subgroup_size: int = 100_000_000,
    widths: Widths | None = None,
    resident_fraction: float | None = 0.0,
    fraction: float | None = None,
    dram: float | None = None,
) -> Prediction:
    """Predict the update of one rank for a model with parameters of ``shapes``.

    Args:
        window: memory and time around the update, of one rank.
        resident_fraction, fraction: as for :func:`~pretrain.optim.offload.plan.make_plan`; ``fraction`` is used where
            the computed one would be.
        dram: bytes/s of a rank's share of host memory, for the bound alone.

    Raises:
        ValueError: sizes that are not positive, or fractions outside [0, 1].
    """
    widths = widths or Widths()
    subgroups = cut_subgroups(rank_targets(shapes, data_parallel), subgroup_size)
    chosen = "computed" if fraction is None else f"fraction {fraction:g}"
    ways = (
        ("CPU only", 0.0, False),
        ("stream all", 1.0, False),
        (chosen, fraction, False),
        (f"{chosen}, overlap", fraction, True),
    )
    arms = []
    for name, wanted, overlap in ways:
        try:
            planned = make_plan(
                subgroups,
                constants,
                widths,
                window,
                fraction=wanted,
                resident_fraction=resident_fraction,
                overlap=overlap,
            )
        except ValueError as problem:
            arms.append(Arm(name, None, str(problem), 0.0, {}, {}))
            continue
        plan = planned.plan
        held = {p: sum(s.numel for s in subgroups if plan.places[s.index] is p) for p in Place}
        arms.append(
            Arm(
                name=name,
                planned=planned,
                problem="",
                bound_s=lower_bound(
                    held[Place.STREAM],
                    held[Place.CPU],
                    held[Place.RESIDENT],
                    constants,
                    widths,
                    window if overlap else Window(device_bytes=window.device_bytes),
                    dram=dram,
                ),
                host=host_parts(plan, subgroups, widths),
                device=device_parts(plan, subgroups, widths),
            )
        )
    return Prediction(sum(prod(shape) for shape in shapes.values()), subgroups, widths, window, tuple(arms))


def rank_window(
    parameters: int,
    *,
    data_parallel: int = 1,
    tokens: float = 0.0,
    flops: float = 400e12,
    device_bytes: float = 139 * GIB,
    activation_bytes: float = 20 * GIB,
    host_bytes: float | None = None,
) -> Window:
    """Memory and time around the update of a rank that holds its shard of BF16 weights and of FP32 gradients, which
    both engines sum in.

    What activations leave free is free all the time; their memory is free in the second half of the last backward pass.
    ``tokens``: of a rank in its last micro-batch, at ``flops`` operations/s (2 per parameter and token forward, 4
    backward).

    Raises:
        ValueError: weights, gradients and activations do not fit.
    """
    weights = (BF16 + SUMMED) * ceil(parameters / data_parallel)
    free = device_bytes - weights - activation_bytes
    if free < 0:
        raise ValueError(
            f"{weights / GIB:.1f} GiB of BF16 weights and FP32 gradients and {activation_bytes / GIB:.1f} GiB of "
            f"activations do not fit in {device_bytes / GIB:.1f} GiB of device memory: use more ranks (data_parallel)"
        )
    forward_s = 2 * parameters * tokens / flops
    return Window(
        device_bytes=int(free),
        early_bytes=int(activation_bytes),
        backward_s=forward_s,
        forward_s=forward_s,
        host_bytes=None if host_bytes is None else int(host_bytes),
    )


def _resident(text: str) -> float:
    return -1.0 if text.startswith("-") and share(text[1:]) >= 0 else share(text)


def _parts(parts: Mapping[str, int]) -> str:
    listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:8.2f} GiB" + (f" ({listed})" if listed else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a prediction."""
    parser = argparse.ArgumentParser(prog="python -m pretrain.optim.offload.predict", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", choices=sorted(ARCHITECTURES))
    model.add_argument("--parameters", type=count, help="in one piece, instead of a model's shapes")
    parser.add_argument("--data-parallel", type=count, default=1, help="ranks that share the optimizer state")
    parser.add_argument("--subgroup-size", type=count, default=100_000_000, help="elements")
    parser.add_argument("--master", choices=("full", "low_bits"), default="full")
    parser.add_argument("--gradient-bytes", type=int, choices=(2, 4), default=2)
    parser.add_argument("--constants", choices=sorted(STATED), default=DEFAULT_CONSTANTS, help="stated, not measured")
    parser.add_argument("--link", type=positive, help="GB/s of each direction, also both at once")
    parser.add_argument("--cpu", type=positive, help="Gparam/s of the CPU update of a rank")
    parser.add_argument("--dram", type=positive, help="GB/s of a rank's share of host memory, for the bound")
    parser.add_argument("--device-memory", type=positive, default=139.0, help="GiB of a device")
    parser.add_argument("--activations", type=positive, default=20.0, help="GiB at their peak")
    parser.add_argument("--host-memory", type=positive, help="GiB of a rank; not limited if not given")
    parser.add_argument("--tokens", type=count, default=2048, help="of a rank's last micro-batch")
    parser.add_argument("--tflops", type=positive, default=400.0, help="of the model's passes on a device")
    parser.add_argument("--resident", type=_resident, default=0.0, help="share whose state stays; below 0: what fits")
    parser.add_argument("--fraction", type=share, help="instead of the computed one")
    args = parser.parse_args(arguments)
    shapes = architecture_shapes(ARCHITECTURES[args.model]) if args.model else {"flat": (1, args.parameters)}
    constants = STATED[args.constants]
    if args.link:
        rate = args.link * 1e9
        constants = replace(constants, h2d=rate, d2h=rate, h2d_duplex=rate, d2h_duplex=rate)
    if args.cpu:
        slowdown = constants.cpu_adam / constants.cpu_adam_with_link
        constants = replace(constants, cpu_adam=args.cpu * 1e9, cpu_adam_with_link=args.cpu * 1e9 / slowdown)
    low = args.master == "low_bits"
    try:
        check_number(sum(target.numel for target in rank_targets(shapes, args.data_parallel)), args.subgroup_size)
        window = rank_window(
            sum(prod(shape) for shape in shapes.values()),
            data_parallel=args.data_parallel,
            tokens=args.tokens,
            flops=args.tflops * 1e12,
            device_bytes=args.device_memory * GIB,
            activation_bytes=args.activations * GIB,
            host_bytes=args.host_memory * GIB if args.host_memory else None,
        )
        prediction = predict(
            shapes,
            constants,
            window,
            data_parallel=args.data_parallel,
            subgroup_size=args.subgroup_size,
            widths=Widths(state=10 if low else 12, gradient=args.gradient_bytes, weight_down=low),
            resident_fraction=None if args.resident < 0 else args.resident,
            fraction=args.fraction,
            dram=args.dram * 1e9 if args.dram else None,
        )
    except ValueError as problem:
        parser.exit(2, f"{problem}\n")
    given = [n for n in ("link", "cpu") if getattr(args, n)]
    print(f"constants: {args.constants}, stated, not measured" + (f"; {' and '.join(given)} as given" if given else ""))
    print("\n".join(prediction.lines()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
