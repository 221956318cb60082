"""Offloaded optimizer state against no offload and against other systems, on one GPU; a function check without one.

    python benchmarks/offload/run.py [--sizes 1b 4b 8b] [--tokens 2048 32768] [--arms main] [--rounds 2]
    python benchmarks/offload/run.py --resume --seconds-limit 540    # in pieces: goes on where it was
    python benchmarks/offload/run.py --smoke                         # the tiny model, about two minutes on two cores
    python benchmarks/offload/run.py --list                          # what would run, and the host memory it needs

Every arm, size and number of tokens runs in a process of its own; arms alternate in rounds. Results are written after
each, to ``benchmarks/results/offload.json`` and ``.md``. What cannot run, or fails, is a row with its reason. README.md
says how things are measured and how to run the whole.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

from offload.arms import Arm, chosen, first_ratio, host_bytes  # noqa: E402
from offload.cell import OUT_OF_DEVICE_MEMORY, OUT_OF_HOST_MEMORY, Order  # noqa: E402
from offload.record import FAILED, FUNCTION_CHECK, MEASURED, NOT_MEASURED, Record, machine  # noqa: E402
from offload.sizes import SIZES, TINY, Size, rows  # noqa: E402
from offload.table import places, report, table  # noqa: E402
from offload.watched import Watched  # noqa: E402

GIB = 2**30
RESULT = _HERE.parent / "results" / "offload.json"
SMOKE_RESULT = _HERE.parents[1] / "build" / "offload_smoke.json"
TINY_TOKENS = 64
NO_TIME = "not run yet: the time was over"
NO_GPU = "no GPU"


def main(given: Sequence[str] | None = None) -> int:
    arguments = _arguments(given)
    arms = chosen(arguments.arms)
    facts = machine()
    cells = list(_cells(arguments, arms, gpu=bool(facts["gpu"])))
    if arguments.list:
        for arm, size, tokens in cells:
            needed, there = host_bytes(arm, size.parameters), facts["host_bytes"]
            more = f", more than the {there / GIB:.0f} GiB here" if needed > there else ""
            print(f"{size.name:>5} {tokens:>7} {arm.name:<24} host state {needed / GIB:6.1f} GiB{more}")
        return 0
    names = ("steps", "warmup", "seed", "micro_tokens", "device_gib")
    command = shlex.join(["python", "benchmarks/offload/run.py", *(sys.argv[1:] if given is None else given)])
    record = Record(
        arguments.out,
        facts,
        {name: getattr(arguments, name) for name in names},
        command,
        resume=arguments.resume,
    )
    for arm, size, tokens in cells:
        cell = record.cell(arm.name, size.name, tokens)
        if not facts["gpu"] and (size.name != TINY or arm.needs_gpu):
            why = f" ({arm.needs_gpu})" if arm.needs_gpu and size.name == TINY else ""
            cell |= {"status": NOT_MEASURED, "reason": NO_GPU + why}
        elif cell["status"] == FAILED and arguments.retry:
            cell |= {"status": NOT_MEASURED, "reason": NO_TIME, "rounds": []}
        elif cell["status"] == NOT_MEASURED:
            cell["reason"] = NO_TIME
    record.save()
    Session(arguments, facts, record).run(cells)
    text = report(record.data)
    arguments.out.with_suffix(".md").write_text(text)
    for size_name, tokens in places(record.data["cells"]):
        print(f"\n{size_name}, {tokens:,} tokens a step")
        print("\n".join(table(record.data["cells"], size_name, tokens, [arm.name for arm in arms])))
    print("\n" + text[text.index("## Goals") :])
    print(f"written: {arguments.out} and .md")
    return 0


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=None, help="default: 1b 4b 8b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048, 32768], help="tokens of a step")
    parser.add_argument("--micro-tokens", type=int, default=None, help="tokens of a micro-batch (default: all)")
    parser.add_argument("--arms", nargs="+", default=["main"], help="main, ablation, all, or names (see --list)")
    parser.add_argument("--steps", type=int, default=None, help="timed steps of a round (default 10)")
    parser.add_argument("--warmup", type=int, default=None, help="steps before them, at least (default 3)")
    parser.add_argument("--rounds", type=int, default=None, help="times that every arm has its turn (default 2)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device-gib", type=float, default=None, help="device memory to leave to every arm")
    parser.add_argument("--host-gib", type=float, default=None, help="end an arm that takes more host memory")
    parser.add_argument("--cell-seconds", type=float, default=900.0, help="end an arm that takes longer")
    parser.add_argument("--seconds-limit", type=float, default=None, help="stop in time, for --resume to go on")
    parser.add_argument("--resume", action="store_true", help="go on with the file of results")
    parser.add_argument("--retry", action="store_true", help="with --resume: run failed arms again")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--smoke", action="store_true", help="the tiny model, few steps, a file below build/")
    parser.add_argument("--list", action="store_true", help="print what would run")
    arguments = parser.parse_args(given)
    smoke = arguments.smoke
    arguments.sizes = arguments.sizes or ([TINY] if smoke else ["1b", "4b", "8b"])
    arguments.steps = arguments.steps or (3 if smoke else 10)
    arguments.warmup = arguments.warmup if arguments.warmup is not None else (1 if smoke else 3)
    arguments.rounds = arguments.rounds or (1 if smoke else 2)
    if arguments.out is None:
        arguments.out = SMOKE_RESULT if smoke else RESULT
        if smoke and not arguments.resume:
            arguments.out.unlink(missing_ok=True)
    return arguments


def _cells(arguments: argparse.Namespace, arms: Sequence[Arm], *, gpu: bool) -> Iterator[tuple[Arm, Size, int]]:
    sizes = list(arguments.sizes)
    if not gpu and TINY not in sizes:
        sizes.insert(0, TINY)
    for name in sizes:
        size = SIZES[name]
        for tokens in [TINY_TOKENS] if name == TINY else arguments.tokens:
            rows(size, tokens)
            yield from ((arm, size, tokens) for arm in arms)


class Session:
    """Runs cells as long as there is time."""

    def __init__(self, arguments: argparse.Namespace, facts: dict[str, Any], record: Record) -> None:
        self._arguments, self._facts, self._record = arguments, facts, record
        self._started = time.monotonic()
        self._longest: dict[str, float] = {}
        for cell in record.data["cells"].values():
            for one in cell["rounds"]:
                self._longest[cell["size"]] = max(self._longest.get(cell["size"], 0.0), one["process_s"])

    def run(self, cells: Sequence[tuple[Arm, Size, int]]) -> None:
        """Arms of one size and number of tokens take turns, forwards and backwards."""
        for place in dict.fromkeys((size.name, tokens) for _, size, tokens in cells):
            turn = [c for c in cells if (c[1].name, c[2]) == place]
            for number in range(self._arguments.rounds):
                for arm, size, tokens in turn if number % 2 == 0 else turn[::-1]:
                    cell = self._record.cell(arm.name, size.name, tokens)
                    if cell["reason"].startswith(NO_GPU) or cell["status"] == FAILED or len(cell["rounds"]) > number:
                        continue
                    if not self._is_time(size.name):
                        return
                    self._turn(cell, arm, size, tokens)
                    self._record.save()

    def _left(self) -> float:
        limit = self._arguments.seconds_limit
        return float("inf") if limit is None else limit - (time.monotonic() - self._started)

    def _is_time(self, size: str) -> bool:
        return self._left() > self._longest.get(size, 0.0)

    def _turn(self, cell: dict[str, Any], arm: Arm, size: Size, tokens: int) -> None:
        ratio = cell["rounds"][0]["ratio"] if cell["rounds"] else self._first_ratio(arm, size, tokens)
        while True:
            started, left = time.monotonic(), self._left()
            result = self._process(arm, size, tokens, ratio, min(self._arguments.cell_seconds, left))
            self._longest[size.name] = max(self._longest.get(size.name, 0.0), time.monotonic() - started)
            if result.get("over") and left < self._arguments.cell_seconds:
                return  # it had no fair chance
            no_room = result["status"] == FAILED and result["reason"].startswith(OUT_OF_DEVICE_MEMORY)
            if ratio is None or not no_room or ratio >= 1:
                break
            # The next tenth leaves more to the CPU.
            ratio = min(1.0, round(ratio + 0.1, 1))
        if result["status"] == FAILED and cell["rounds"]:
            cell["reason"] = f"round {len(cell['rounds']) + 1}: {result['reason']}"
        elif result["status"] == FAILED:
            cell |= {"status": FAILED, "reason": result["reason"]}
        else:
            cell["rounds"].append({**result, "process_s": time.monotonic() - started})
            cell |= {"status": FUNCTION_CHECK if result["function_check"] else MEASURED, "reason": ""}
        shown = result["reason"] if result["status"] == FAILED else cell["status"]
        print(f"{size.name} {tokens} {arm.name}: {shown} ({time.monotonic() - started:.0f} s)", flush=True)

    def _first_ratio(self, arm: Arm, size: Size, tokens: int) -> float | None:
        if not arm.by_ratio:
            return None
        room = self._arguments.device_gib * GIB if self._arguments.device_gib else float(self._facts["gpu_bytes"])
        return first_ratio(size.parameters, room, self._micro_tokens(tokens), size.vocabulary)

    def _micro_tokens(self, tokens: int) -> int:
        asked: int | None = self._arguments.micro_tokens
        return tokens if asked is None else min(tokens, asked)

    def _process(self, arm: Arm, size: Size, tokens: int, ratio: float | None, seconds: float) -> dict[str, Any]:
        """The result of one process, as :mod:`offload.cell` writes it, or the reason why it wrote none."""
        a = self._arguments
        order = Order(
            arm.name, size.name, tokens, self._micro_tokens(tokens), a.steps, a.warmup, a.seed, a.device_gib, ratio
        )
        with tempfile.TemporaryDirectory() as folder:
            asked, answered, log = (Path(folder) / name for name in ("order.json", "result.json", "log"))
            asked.write_text(json.dumps(vars(order)))
            with open(log, "wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, str(_HERE / "cell.py"), str(asked), str(answered)],
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # one group with its workers, to end them together
                )
                watched = Watched(process, seconds, None if a.host_gib is None else a.host_gib * GIB)
                ended = watched.wait()
            end = log.read_text(errors="replace").strip().splitlines()[-3:]
            if answered.exists():
                result: dict[str, Any] = json.loads(answered.read_text())
                if result["status"] == "measured":
                    result["peak_host_bytes"] = max(result["peak_host_bytes"], watched.peak_bytes)
                return result
        if ended == Watched.OVER_TIME:
            return {"status": FAILED, "reason": f"not done within {seconds:.0f} s", "over": True}
        if ended == Watched.OVER_MEMORY:
            return {"status": FAILED, "reason": f"{OUT_OF_HOST_MEMORY}: more than --host-gib {a.host_gib:g}"}
        if process.returncode == -9:
            return {"status": FAILED, "reason": f"{OUT_OF_HOST_MEMORY}, probably: the process was killed"}
        return {"status": FAILED, "reason": f"failed: exit {process.returncode}: {' / '.join(end)}"[:300]}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
