"""The fused CPU AdamW against DeepSpeedCPUAdam and torch.optim.AdamW(fused=True): updates per second, and the memory.

    python benchmarks/cpu_adamw.py [--parameters 67108864] [--threads 1 2] [--rounds 15]

Three tasks on FP32 master and moments, far larger than the caches. ``plain``: one update from an FP32 gradient.
``fp32`` and ``bf16``: what a step of mixed precision with clipping needs, from such a gradient: unscale and clip,
update, write the BF16 weights. Ours does each in one pass. The others do it by separate passes, as DeepSpeed's ZeRO
offload does: widen the gradient (bf16 only), ``mul_`` by the clip factor, step, ``copy_`` to BF16; torch's fused AdamW
unscales inside its step (``grad_scale``). ``low bits`` is ours with only the low half of the master stored.

``traffic`` reads four FP32 arrays and writes three of them, as the plain update must, with one addition each: what
memory gives this number of threads. Bytes per parameter count reads and writes that the passes ask for, without the
lines that a processor reads before it overwrites them. All take turns within each round; figures are medians and
quartiles over rounds, ratios are taken within a round. Each number of threads has a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results_file import RESULTS, quartiles, write_result

BYTES = {
    ("traffic", "bound"): 28,
    ("plain", "ours"): 28,
    ("plain", "deepspeed"): 28,
    ("plain", "torch fused"): 28,
    ("fp32", "ours"): 30,
    ("fp32", "deepspeed"): 42,
    ("fp32", "torch fused"): 38,
    ("bf16", "ours"): 28,
    ("bf16", "ours, low bits"): 26,
    ("bf16", "deepspeed"): 48,
    ("bf16", "torch fused"): 44,
}
GOALS = {"plain": 1.0, "fp32": 1.3, "bf16": 1.3}

_TRAFFIC = r"""
#include <cstdint>
typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));
extern "C" void traffic(int threads, int64_t n, float* a, float* b, float* c, const float* d) {
    const int64_t share = ((n + threads - 1) / threads + 1023) / 1024 * 1024;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t stop = (t + 1) * share < n ? (t + 1) * share : n;
        for (int64_t i = t * share; i < stop; i += 16) {
            __builtin_prefetch(a + i + 256); __builtin_prefetch(b + i + 256);
            __builtin_prefetch(c + i + 256); __builtin_prefetch(d + i + 256);
            const Line x = *(const Line*)(d + i);
            const Line y = *(Line*)(a + i) + x, z = *(Line*)(b + i) + x, u = *(Line*)(c + i) + x;
            *(Line*)(a + i) = y; *(Line*)(b + i) = z; *(Line*)(c + i) = u;
        }
    }
}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=64 << 20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.parameters % 4096:
        parser.error(f"--parameters {arguments.parameters}: expected a multiple of 4096")
    context = multiprocessing.get_context("spawn")
    tables: dict[str, Any] = {}
    level = ""
    for threads in arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by every OpenMP runtime of the process about to start
        results = context.SimpleQueue()
        process = context.Process(target=_measure, args=(threads, arguments.parameters, arguments.rounds, results))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit("the measuring process failed; its error is above")
        level, seconds = results.get()
        tables[str(threads)] = _figures(seconds, arguments.parameters)
    text = _report(tables, level, arguments.parameters)
    print(text)
    write_result("cpu_adamw", {"arguments": vars(arguments), "level": level, "threads": tables})
    (RESULTS / "cpu_adamw.md").write_text(text + "\n")


def _measure(threads: int, parameters: int, rounds: int, results: Any) -> None:
    import torch

    from pretrain.optim.offload.cpu_adamw import kernel_level

    torch.set_num_threads(threads)
    contenders = _contenders(threads, parameters)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
    for round_ in range(rounds + 1):  # the first is warm-up
        for key, run in contenders.items():
            started = time.perf_counter()
            run()
            if round_:
                seconds[key].append(time.perf_counter() - started)
    results.put((kernel_level(), seconds))


def _contenders(threads: int, n: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by task and name. All work on the same arrays."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    from pretrain.optim.offload.arithmetic import StepScalars
    from pretrain.optim.offload.cpu_adamw import cpu_adamw_

    hyper: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(1)
    master = torch.empty(n).normal_(0, 0.02, generator=generator)
    exp_avg, exp_avg_sq = torch.full((n,), 1e-3), torch.full((n,), 1e-5)
    gradient = torch.empty(n).normal_(0, 1e-3, generator=generator)
    gradient_bf16, weight = gradient.bfloat16(), master.bfloat16()
    low = torch.zeros(n, dtype=torch.int16)
    # A factor of one costs the same and leaves the gradient as it is from round to round.
    factor, one = 1.0, torch.ones(())
    scalars = StepScalars.of(step=2, learning_rate=1e-6, grad_scale=factor, **hyper)
    parameter = torch.nn.Parameter(master)
    parameter.grad = gradient
    deepspeed = DeepSpeedCPUAdam([parameter], lr=1e-6, adamw_mode=True, **hyper)
    deepspeed.state[parameter] = {"step": 1, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    fused = torch.optim.AdamW([parameter], lr=1e-6, fused=True, **hyper)
    fused.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def deepspeed_passes(widen: bool) -> None:
        if widen:
            gradient.copy_(gradient_bf16)
        gradient.mul_(factor)
        deepspeed.step()
        weight.copy_(master)

    def fused_passes(widen: bool) -> None:
        if widen:
            gradient.copy_(gradient_bf16)
        fused.grad_scale = one  # type: ignore[attr-defined]
        fused.step()
        del fused.grad_scale  # type: ignore[attr-defined]
        weight.copy_(master)

    def ours(of: torch.Tensor, output: torch.Tensor | None, first: torch.Tensor = master) -> Callable[[], None]:
        return lambda: cpu_adamw_(first, exp_avg, exp_avg_sq, of, output, scalars, threads=threads)

    # The bound adds zeros, so it changes nothing; its arrays are as large as the others'.
    arrays = (master, exp_avg, exp_avg_sq, torch.zeros(n))
    traffic = _traffic_probe()

    def bound() -> None:
        traffic(threads, ctypes.c_int64(n), *(ctypes.c_void_p(array.data_ptr()) for array in arrays))

    return {
        ("traffic", "bound"): bound,
        ("plain", "ours"): ours(gradient, None),
        ("plain", "deepspeed"): deepspeed.step,
        ("plain", "torch fused"): fused.step,
        ("fp32", "ours"): ours(gradient, weight),
        ("fp32", "deepspeed"): lambda: deepspeed_passes(widen=False),
        ("fp32", "torch fused"): lambda: fused_passes(widen=False),
        ("bf16", "ours"): ours(gradient_bf16, weight),
        ("bf16", "ours, low bits"): ours(gradient_bf16, weight, low),
        ("bf16", "deepspeed"): lambda: deepspeed_passes(widen=True),
        ("bf16", "torch fused"): lambda: fused_passes(widen=True),
    }


def _traffic_probe() -> Callable[..., None]:
    from pretrain.optim.offload.kernel_build import find_compiler

    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "traffic.cpp", Path(folder) / "traffic.so"
        source.write_text(_TRAFFIC)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-fopenmp"]
        subprocess.run([*find_compiler(), *flags, str(source), "-o", str(library)], check=True)
        function: Callable[..., None] = ctypes.CDLL(str(library)).traffic
    return function


def _figures(seconds: dict[tuple[str, str], list[float]], parameters: int) -> dict[str, Any]:
    """For each task and contender: Gparam/s, GB/s; for each task the ratio of ours to the best other."""
    figures: dict[str, Any] = {}
    for (task, name), times in seconds.items():
        rates = [parameters / value / 1e9 for value in times]
        figures.setdefault(task, {})[name] = {
            "gparam_per_s": quartiles(rates),
            "bytes_per_parameter": BYTES[task, name],
            "gb_per_s": statistics.median(rates) * BYTES[task, name],
        }
    for task in GOALS:
        others = [name for name in ("deepspeed", "torch fused") if (task, name) in seconds]
        best = min(others, key=lambda name: statistics.median(seconds[task, name]))
        ratios = [other / own for other, own in zip(seconds[task, best], seconds[task, "ours"], strict=True)]
        figures[task]["ratio"] = {"to": best, **quartiles(ratios)}
    bounds = [own / bound for own, bound in zip(seconds["plain", "ours"], seconds["traffic", "bound"], strict=True)]
    figures["plain"]["time_over_traffic_bound"] = quartiles(bounds)
    return figures


def _report(tables: dict[str, Any], level: str, parameters: int) -> str:
    lines = [f"AdamW on the CPU, {parameters / 1e6:.0f}M parameters, kernel level {level}.", ""]
    lines += ["| threads | task | contender | Gparam/s (quartiles) | bytes/param | GB/s |", "|---|---|---|---|---|---|"]
    for threads, figures in tables.items():
        for task, contenders in figures.items():
            for name, row in contenders.items():
                if "gparam_per_s" in row:
                    rate = row["gparam_per_s"]
                    spread = f"{rate['median']:.2f} ({rate['low']:.2f} .. {rate['high']:.2f})"
                    size, speed = row["bytes_per_parameter"], row["gb_per_s"]
                    lines.append(f"| {threads} | {task} | {name} | {spread} | {size} | {speed:.1f} |")
    lines.append("")
    for threads, figures in tables.items():
        for task, goal in GOALS.items():
            ratio = figures[task]["ratio"]
            verdict = "reached" if ratio["median"] >= goal else "NOT reached"
            lines.append(
                f"- {threads} threads, {task}: {ratio['median']:.2f}x the best other ({ratio['to']}; quartiles "
                f"{ratio['low']:.2f} .. {ratio['high']:.2f}); goal of at least {goal}: {verdict}"
            )
        bound = figures["plain"]["time_over_traffic_bound"]["median"]
        lines.append(f"- {threads} threads, plain: {bound:.2f} times the time that its memory traffic alone takes")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
