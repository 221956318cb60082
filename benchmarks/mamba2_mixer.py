"""Our Mamba-2 mixer against transformers' and against the floor, forward and backward, on CPU.

    python benchmarks/mamba2_mixer.py [--shape paper|demo] [--rounds 15] [--threads 1]

The contenders take turns in every round, so that what else the machine does falls on all of them alike; ratios are
taken within a round, and their median and quartiles are reported. All have the same weights and inputs.

* ours: `pretrain.nn.mamba2.Mamba2Mixer`.
* transformers: `Mamba2Mixer` in its pure-torch form (no mamba_ssm kernels), chunk size 256 as by default.
* floor: what any torch mixer has to do besides the state-space part, written plainly: two linear layers,
  grouped conv1d with SiLU, gated RMSNorm.
* projections: the two linear layers alone.

The table also splits our time by part. A JSON record goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from results_file import quartiles, write_result
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config as TheirConfig
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer as TheirMixer

from pretrain.nn.layout import SequenceLayout
from pretrain.nn.mamba2 import Mamba2Mixer
from pretrain.nn.mamba2_config import Mamba2Config
from pretrain.ops.conv import causal_conv
from pretrain.ops.norm import gated_rms_norm
from pretrain.ops.ssd import ssd_chunked
from pretrain.parallel.layers import TorchLayers


class Shape(NamedTuple):
    """Sizes of one benchmark; expand 2, one group, convolution of 4."""

    width: int
    heads: int
    state: int
    length: int
    batch: int

    @property
    def inner(self) -> int:
        return 2 * self.width

    @property
    def head_dim(self) -> int:
        return self.inner // self.heads

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.state


SHAPES = {"paper": Shape(512, 16, 64, 2048, 2), "demo": Shape(192, 6, 64, 512, 2)}


class Contender(NamedTuple):
    """Something to time: a forward function and the gradient to send back through its output."""

    forward: Callable[[], Tensor]
    gradient: Tensor


def build(shape: Shape) -> tuple[dict[str, Contender], dict[str, Contender]]:
    """(contenders, parts of ours), after checking that ours and theirs agree."""
    torch.manual_seed(0)
    theirs = TheirMixer(
        TheirConfig(
            hidden_size=shape.width, num_heads=shape.heads, head_dim=shape.head_dim, state_size=shape.state,
            n_groups=1, expand=2, num_hidden_layers=1,
        ),
        layer_idx=0,
    )  # fmt: skip
    ours: Any = Mamba2Mixer(
        TorchLayers(),
        shape.width,
        Mamba2Config(head_dim=shape.head_dim, state_dim=shape.state, chunk_size=64),
        norm_eps=theirs.layer_norm_epsilon,
    )
    _copy_weights(theirs, ours)
    L, B = shape.length, shape.batch
    x_LBD, dy_LBD = torch.randn(L, B, shape.width), torch.randn(L, B, shape.width)
    x_BLD, dy_BLD = (t.transpose(0, 1).contiguous() for t in (x_LBD, dy_LBD))
    x_LBD.requires_grad_()
    x_BLD.requires_grad_()
    layout = SequenceLayout(L, B, x_LBD.device)
    sizes = [shape.inner, shape.channels, shape.heads]

    def floor() -> Tensor:
        z, xBC, _ = F.linear(x_BLD, theirs.in_proj.weight).split(sizes, dim=-1)
        xBC = F.silu(theirs.conv1d(xBC.transpose(1, 2))[..., :L]).transpose(1, 2)
        return F.linear(theirs.norm(xBC[..., : shape.inner], z), theirs.out_proj.weight)

    def projections() -> Tensor:
        inner = F.linear(x_LBD, ours.in_proj.weight)[..., : shape.inner]
        return F.linear(inner, ours.out_proj.weight)

    contenders = {
        "ours": Contender(lambda: ours(x_LBD, layout), dy_LBD),
        "transformers": Contender(lambda: theirs(x_BLD), dy_BLD),
        "floor": Contender(floor, dy_BLD),
        "projections": Contender(projections, dy_LBD),
    }
    _check_agreement(contenders, x_LBD, x_BLD)
    return contenders, _parts(ours, shape)


def _copy_weights(theirs: Any, ours: Any) -> None:
    with torch.no_grad():
        for linear in (theirs.in_proj, theirs.out_proj):
            linear.weight.normal_(0, linear.in_features**-0.5)
        ours.in_proj.weight.copy_(theirs.in_proj.weight)
        ours.conv.weight.copy_(theirs.conv1d.weight[:, 0])
        ours.conv.bias.copy_(theirs.conv1d.bias)
        ours.norm.weight.copy_(theirs.norm.weight)
        ours.out_proj.weight.copy_(theirs.out_proj.weight)
        for name in ("A_log", "D", "dt_bias"):
            getattr(ours, name).copy_(getattr(theirs, name))


def _check_agreement(contenders: dict[str, Contender], x_LBD: Tensor, x_BLD: Tensor) -> None:
    outputs = {}
    for name, x in (("ours", x_LBD), ("transformers", x_BLD)):
        y = contenders[name].forward()
        dx = torch.autograd.grad(y, x, contenders[name].gradient)[0]
        outputs[name] = [t if name == "ours" else t.transpose(0, 1) for t in (y.detach(), dx)]
    for ours, theirs in zip(*outputs.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def _parts(ours: Any, shape: Shape) -> dict[str, Contender]:
    """The three operations of our mixer between the projections, each by itself."""
    L, B, H = shape.length, shape.batch, shape.heads
    projected = torch.randn(L, B, shape.inner + shape.channels)
    z = projected[..., : shape.inner].requires_grad_()
    xBC = projected.detach()[..., shape.inner :].requires_grad_()
    activated = torch.randn(L, B, shape.channels, requires_grad=True)
    dt = (torch.rand(L, B, H) * 0.1).requires_grad_()
    y = torch.randn(L, B, shape.inner, requires_grad=True)
    dy, dxBC = torch.randn(L, B, shape.inner), torch.randn(L, B, shape.channels)

    def ssd() -> Tensor:
        x, keys, queries = activated.split([shape.inner, shape.state, shape.state], dim=-1)
        A = -ours.A_log.exp()
        return ssd_chunked(
            x.unflatten(-1, (H, -1)), dt, A, keys[:, :, None], queries[:, :, None], ours.D
        )[0].flatten(2)  # fmt: skip

    return {
        "convolution": Contender(lambda: causal_conv(xBC, ours.conv.weight, ours.conv.bias), dxBC),
        "state space": Contender(ssd, dy),
        "gated norm": Contender(lambda: gated_rms_norm(y, z, ours.norm.weight), dy),
    }


def measure(contenders: dict[str, Contender], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(forward, backward) seconds per round; one round before the count warms up."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            y = contender.forward()
            middle = time.perf_counter()
            y.backward(contender.gradient)
            if turn:
                seconds[name].append((middle - start, time.perf_counter() - middle))
    return seconds


def summarise(seconds: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    return {
        name: {
            "forward_s": quartiles([forward for forward, _ in turns]),
            "backward_s": quartiles([backward for _, backward in turns]),
            "total_s": quartiles([sum(turn) for turn in turns]),
        }
        for name, turns in seconds.items()
    }


def ratio(seconds: dict[str, list[tuple[float, float]]], numerator: str, denominator: str) -> dict[str, float]:
    """Quartiles of the ratio of totals within a round."""
    pairs = zip(seconds[numerator], seconds[denominator], strict=True)
    return quartiles([sum(above) / sum(below) for above, below in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="paper")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = SHAPES[arguments.shape]
    contenders, parts = build(shape)
    seconds = measure(contenders, arguments.rounds)
    part_seconds = measure(parts, arguments.rounds)
    ratios = {
        "transformers / ours": ratio(seconds, "transformers", "ours"),
        "ours / floor": ratio(seconds, "ours", "floor"),
        "ours / projections": ratio(seconds, "ours", "projections"),
    }
    print(f"Mamba-2 mixer, {shape}, fp32, {arguments.threads} thread(s), {arguments.rounds} rounds; medians in ms")
    print(f"{'':14}{'forward':>10}{'backward':>10}{'total':>10}   quartiles of total")
    for name, row in {**summarise(seconds), **summarise(part_seconds)}.items():
        medians = [row[key]["median"] * 1e3 for key in ("forward_s", "backward_s", "total_s")]
        spread = [row["total_s"][key] * 1e3 for key in ("low", "high")]
        print(f"{name:14}" + "".join(f"{m:10.1f}" for m in medians) + "   {:.1f} .. {:.1f}".format(*spread))
    for name, value in ratios.items():
        print(f"{name:22}{value['median']:6.2f}   ({value['low']:.2f} .. {value['high']:.2f})")
    figures = {
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "shape": shape._asdict() | {"name": arguments.shape},
        "ratios": ratios,
        "contenders": summarise(seconds),
        "parts_of_ours": summarise(part_seconds),
    }
    write_result(f"mamba2_mixer_{arguments.shape}", figures)


if __name__ == "__main__":
    main()
