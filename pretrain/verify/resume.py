"""``pretrain verify resume``: a run that was killed and resumed, compared with an undisturbed one, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.run_dir import RunDir
from pretrain.verify.compare import (
    Divergence,
    Tolerance,
    deviation,
    exact_divergence,
    scalar_divergence,
    state_divergence,
)
from pretrain.verify.experiment import Experiment
from pretrain.verify.runs import StepWatch, finish, kill_when
from pretrain.verify.traces import AttemptTrace, Moment, read_attempt, trace_file

Say = Callable[[str], None]


@dataclass(frozen=True)
class ResumePlan:
    """``steps`` in all, killed with step ``kill_at`` recorded, checkpoints every ``interval`` steps.

    ``then`` are overrides for the resumed part (another layout); empty means the same layout.
    """

    steps: int
    kill_at: int
    interval: int
    then: tuple[str, ...]

    @classmethod
    def make(cls, steps: int, kill_at: int | None, then: Sequence[str]) -> ResumePlan:
        """Choose what is not given. Raises ValueError when no step is left on one side of the kill."""
        kill_at = max(2, steps * 3 // 5) if kill_at is None else kill_at
        if not 2 <= kill_at < steps:
            raise ValueError(
                f"--kill-at: found {kill_at} with --steps {steps}; expected at least 2 and less than the steps, so "
                "that a checkpoint comes before the kill and a step after it"
            )
        # The largest interval that puts the kill between checkpoints, with one to go back to.
        fitting = [n for n in range(1, kill_at // 2 + 2) if kill_at % n]
        return cls(steps, kill_at, max(fitting, default=1), tuple(then))


def verify_resume(experiment: Experiment, plan: ResumePlan, folder: Path, say: Say) -> bool:
    """Make the runs in ``folder``, compare and say the outcome; returns whether the resumed run is the same run.

    Raises:
        ValueError: bad input, found before anything runs where possible.
        RunFailedError: a run failed by itself.
    """
    own = [f"train.steps={plan.steps}", f"train.checkpoint_interval={plan.interval}"]
    base = experiment.with_overrides(own)
    tree, config = base.check()
    resumed_config = base.check_resumed(tree, plan.then)
    ranks, resumed_ranks = config.launcher.num_processes, resumed_config.launcher.num_processes
    tolerance = base.tolerance(config)
    layout = " with " + " ".join(plan.then) if plan.then else " on the same layout"
    say(
        f"{plan.steps} steps on {ranks} process(es), checkpoints every {plan.interval} steps; "
        f"killed at step {plan.kill_at}, resumed{layout}"
    )
    whole, parts = RunDir(folder / "undisturbed"), RunDir(folder / "killed")
    seconds = finish("the undisturbed run", folder / "undisturbed.log", base.run_arguments(whole.path))
    say(f"1/3 undisturbed: {plan.steps} steps, {seconds:.1f} s")

    watch = StepWatch([trace_file(parts.trace_path(1), rank) for rank in range(ranks)])
    seconds, killed = kill_when(
        "the run to be killed",
        folder / "killed.log",
        base.run_arguments(parts.path),
        lambda: watch.reached(plan.kill_at) and (parts.checkpoints_path / "latest").is_file(),
    )
    first = read_attempt(parts.trace_path(1), ranks)
    last = max(first.steps)
    say(f"2/3 killed: SIGKILL to {killed} processes with step {last} recorded, {seconds:.1f} s")

    seconds = finish("the resumed run", folder / "resumed.log", ["resume", parts.path, *plan.then])
    second = read_attempt(parts.trace_path(2), resumed_ranks)
    say(f"3/3 resumed: from the checkpoint of step {second.start.step} to step {plan.steps}, {seconds:.1f} s")

    twin = read_attempt(whole.trace_path(1), ranks)
    if fault := _before_kill(twin, first):
        say(f"DIVERGED before the kill: the run itself does not repeat.\n  {fault}")
        return False
    if plan.then:
        return _compare_layouts(plan, twin, first, second, tolerance, say)
    return _compare_exactly(plan, twin, second, say)


def _before_kill(twin: AttemptTrace, first: AttemptTrace) -> Divergence | None:
    """First difference of the two runs over the steps that both did undisturbed."""
    if fault := exact_divergence(twin.start, first.start):
        return fault
    faults = (exact_divergence(twin.steps[step], moment) for step, moment in sorted(first.steps.items()))
    return next((fault for fault in faults if fault), None)


def _compare_exactly(plan: ResumePlan, twin: AttemptTrace, second: AttemptTrace, say: Say) -> bool:
    """Same layout: every bit. The loaded state first, then each step."""
    start = second.start.step
    fault = state_divergence(_state_at(twin, start), second.start)
    fault = fault or scalar_divergence(_state_at(twin, start), second.start)
    if fault:
        say(f"DIVERGED at the resume, undisturbed != loaded:\n  {fault}")
        return False
    for step in range(start + 1, plan.steps + 1):
        if fault := exact_divergence(twin.steps[step], second.steps[step]):
            say(f"DIVERGED after the resume, undisturbed != resumed:\n  {fault}")
            return False
    ranks = len(second.start.records)
    say(
        f"identical: {plan.steps} steps on {ranks} rank(s), {_tensors(second)}: sample ids, random state, loss, "
        "gradient norm and every tensor, bit for bit"
    )
    return True


def _compare_layouts(
    plan: ResumePlan, twin: AttemptTrace, first: AttemptTrace, second: AttemptTrace, tolerance: Tolerance, say: Say
) -> bool:
    """Another layout: the loaded state bit for bit, then samples exactly, loss and gradient norm within tolerance."""
    start = second.start.step
    fault = state_divergence(_state_at(first, start), second.start)
    fault = fault or scalar_divergence(_state_at(first, start), second.start)
    if fault:
        say(f"DIVERGED at the move, saved != loaded:\n  {fault}")
        return False
    say(f"moved: {_tensors(second)}, bit for bit as saved at step {start}")
    gap = deviation(twin.steps, second.steps, range(start + 1, plan.steps + 1), tolerance)
    if gap.divergence:
        say(f"DIVERGED after the move, undisturbed != resumed:\n  {gap.divergence}")
        return False
    if gap.is_bitwise:
        say(f"identical: {gap.steps} steps after the move: sample ids, loss, gradient norm and every tensor")
        return True
    say(
        f"within tolerance: {gap.steps} steps after the move: sample ids equal; "
        f"loss {_distance(gap.loss, gap.loss_step, tolerance.loss)}; "
        f"gradient norm {_distance(gap.grad_norm, gap.grad_norm_step, tolerance.grad_norm)}, relative; "
        f"whole state bit for bit equal at {gap.state_bitwise_steps} of {gap.steps} steps"
    )
    return True


def _state_at(trace: AttemptTrace, step: int) -> Moment:
    return trace.steps[step] if step else trace.start


def _distance(largest: float, step: int, tolerance: float) -> str:
    return f"at most {largest:.1e} apart (step {step}; tolerance {tolerance:.0e})" if largest else "equal"


def _tensors(trace: AttemptTrace) -> str:
    """``96 tensors (32 master, 32 exp_avg, 32 exp_avg_sq)``."""
    counts = Counter(key.partition(":")[0] for key in trace.start.state)
    return f"{sum(counts.values())} tensors ({', '.join(f'{n} {slot}' for slot, n in counts.items())})"
