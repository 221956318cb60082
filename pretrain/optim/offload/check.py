"""``python -m pretrain.optim.offload.check``: the executor on simulated devices, random trainings, plans and orders.

Every trial draws a small training, a plan and an order in which queues run, and compares weights and state with those
of the same training on the host under another plan, bit for bit; no two accesses to the same byte may be unordered.
With ``--plant`` the executor has a defect, which has to be found.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass

from pretrain.optim.offload.planted import DEFECTS, Defect
from pretrain.optim.offload.schedule import Place
from pretrain.optim.offload.shadow import RaceError
from pretrain.optim.offload.simulated import SimulatedDevice
from pretrain.optim.offload.trials import Training, Way, go_beside, go_inline, random_training, random_way


@dataclass(frozen=True)
class Trial:
    """What was gone through; ``fault``: what was found wrong, None for nothing; ``operations``: how many ran."""

    training: Training
    way: Way
    fault: str | None
    operations: int


def trial(seed: int, defect: Defect | None = None) -> Trial:
    """Draw by ``seed``, run, compare."""
    source = random.Random(seed)
    while True:
        training = random_training(source)
        way = random_way(source, training)
        if defect is None or defect.suits(training, way):
            break
    expected = go_inline(training, random_way(source, training))
    device = (SimulatedDevice if defect is None else defect.device)(seed)
    try:
        outcome = go_beside(training, way, device, seed=seed, change=None if defect is None else defect.change)
        fault = outcome.difference(expected)
    except RaceError as error:
        fault = str(error)
    except Exception as error:
        # What was refused after a failure names the failure as its cause.
        first = error.__cause__ or error
        fault = f"{type(first).__name__}: {first}"
    return Trial(training, way, fault, len(device.trace))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pretrain.optim.offload.check", description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each further one has the next (default: 0)")
    parser.add_argument("--plant", choices=[*DEFECTS, "all"], metavar="NAME", help="a defect: %(choices)s")
    options = parser.parse_args(arguments)
    if options.trials < 1:
        parser.error(f"--trials is {options.trials}, expected at least 1")
    seeds = range(options.seed, options.seed + options.trials)
    if options.plant is None:
        return _check(seeds)
    names = list(DEFECTS) if options.plant == "all" else [options.plant]
    return max(_plant(name, seeds) for name in names)


def _check(seeds: range) -> int:
    start = time.perf_counter()
    trials = []
    for seed in seeds:
        done = trial(seed)
        trials.append(done)
        if done.fault is not None:
            print(f"seed {seed}: {done.fault}\n  {done.training}\n  {done.way}", file=sys.stderr)
    places = Counter(place for t in trials for place in t.way.plan.places)
    faults = sum(t.fault is not None for t in trials)
    print(
        f"{len(trials)} trials, {sum(len(t.training.steps) for t in trials)} steps "
        f"({sum(step.dropped for t in trials for step in t.training.steps)} dropped), "
        f"{sum(len(t.way.plan.places) for t in trials)} subgroups "
        f"({', '.join(f'{places[place]} {place}' for place in Place)}), "
        f"{sum(t.operations for t in trials)} operations in random order, {time.perf_counter() - start:.1f} s"
    )
    ways = [t.way for t in trials]
    print(
        f"early state in {sum(way.plan.num_early > 0 for way in ways)} trials, "
        f"early gradients in {sum(way.plan.early_gradients for way in ways)}, "
        f"replanned in {sum(way.second_plan is not None for way in ways)}"
    )
    print("no race, all bits equal" if not faults else f"{faults} trials at fault")
    return int(faults > 0)


def _plant(name: str, seeds: range) -> int:
    defect = DEFECTS[name]
    faults = [t.fault for seed in seeds if (t := trial(seed, defect)).fault is not None]
    print(f"{name}: {defect.what}: found in {len(faults)} of {len(seeds)} trials")
    if faults:
        print(f"  {faults[0]}")
    return int(not faults)


if __name__ == "__main__":
    sys.exit(main())
