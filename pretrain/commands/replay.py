"""``pretrain replay``: run one step of a run again, on this machine, and show what it is made of."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

_SHOWN_GRADIENTS = 12
_SHOWN_TEXT = 300
_POLL_S = 0.25


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="run directory; it is only read")
    parser.add_argument("--step", type=int, required=True, help="step to run again, without its update")
    parser.add_argument("--batch", type=int, help="of several batches tried at the step (default: the last bad one)")
    parser.add_argument("--output", type=Path, help="new folder for the result (default: replay_RUN_step_N here)")


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from launchers.local import start_ranks
    from launchers.run_dir import RunDir
    from pretrain.config.check import check
    from pretrain.training.replay import RESULT_NAME
    from pretrain.training.replay_target import ReplayError, replay_target

    source = RunDir.open(arguments.run_dir)
    config = check(source.config())
    target = replay_target(source, config.train.global_batch_size, arguments.step, arguments.batch)
    output = (arguments.output or Path(f"replay_{source.path.name}_step_{arguments.step}")).absolute()
    if output.is_relative_to(source.path.absolute()):
        raise ReplayError(f"--output {output} lies in the run directory, which is only read; choose another folder")
    if output.exists() and any(output.iterdir()):
        raise ReplayError(f"--output {output} is not empty; choose another folder")
    output.mkdir(parents=True, exist_ok=True)
    launcher = config.launcher
    origin = f"checkpoint {target.checkpoint.name}" if target.checkpoint is not None else "the initial weights"
    print(f"replaying step {target.step} on batch {target.batch} from {origin}, {launcher.num_processes} process(es)")
    program = [sys.executable, "-m", "pretrain.training.replay", str(source.path), "--step", str(target.step)]
    program += ["--batch", str(target.batch), "--output", str(output)]
    place = RunDir(output)
    with start_ranks(
        place,
        attempt=0,
        num_processes=launcher.num_processes,
        threads_per_process=launcher.threads_per_process,
        program=program,
    ) as ranks:
        while ranks.num_running():
            ranks.wait(_POLL_S)
            if failed := [end for end in ranks.ends() if end.code]:
                # The others would wait for it for ever.
                log = place.rank_log_path(0, failed[0].rank)
                lines = log.read_text(errors="replace").splitlines()[-20:]
                print("\n".join([*lines, f"pretrain: rank {failed[0].rank} failed; its log: {log}"]), file=sys.stderr)
                return failed[0].code or 1
    text = describe(json.loads((output / RESULT_NAME).read_text(encoding="utf-8")))
    (output / "replay.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nwritten: {output / RESULT_NAME}, {output / 'replay.txt'}")
    return 0


def describe(result: dict[str, Any]) -> str:
    """The result for reading."""
    origin = "the initial weights" if result["checkpoint"] is None else Path(result["checkpoint"]).name
    lines = [
        f"step {result['step']}, batch {result['batch']}: {len(result['samples'])} samples, "
        f"{result['targets']} targets",
        f"  from {origin}, {result['steps_advanced']} steps trained again; {result['processes']} process(es), "
        f"engine {result['engine']}, learning rate {result['learning_rate']:.4g}",
        f"  loss {result['loss']}, gradient norm {result['grad_norm']}",
        f"  {_verdict(result)}",
    ]
    if event := result["event"]:
        lines.append(f"  on record as bad: {event['kind']}, action {event['action']}, left out {event['skipped']}")
    lines.append("")
    for what, found in result["not_finite"].items():
        names = [entry if isinstance(entry, str) else f"{entry['name']} ({entry['not_finite']})" for entry in found]
        shown = ", ".join(names[:_SHOWN_GRADIENTS]) + (f" and {len(names) - _SHOWN_GRADIENTS} more" * (len(names) > 12))
        lines.append(f"not finite, {what}: {shown or 'none'}")
    lines += ["", "gradient norms by parameter, largest first"]
    for row in result["gradients"][:_SHOWN_GRADIENTS]:
        lines.append(
            f"  {row['norm'] if isinstance(row['norm'], str) else format(row['norm'], '10.4g')}  {row['name']}"
        )
    if (more := len(result["gradients"]) - _SHOWN_GRADIENTS) > 0:
        lines.append(f"  and {more} more in replay.json")
    lines += ["", "samples, largest loss first (without dropout)"]
    for sample in sorted(result["samples"], key=_rank):
        loss = sample["loss"] if isinstance(sample["loss"], str | None) else format(sample["loss"], ".4f")
        lines.append(
            f"  sample {sample['id']}: loss {loss}, {sample['targets']} targets, {_where(sample['provenance'])}"
        )
        if "text" in sample:
            lines.append(f"    {json.dumps(sample['text'][:_SHOWN_TEXT], ensure_ascii=False)}")
    return "\n".join(lines)


def _verdict(result: dict[str, Any]) -> str:
    if result["reproduced"] is None:
        return "the run has no loss on record for this step (train.log_interval)"
    if result["reproduced"]:
        return "the loss on record is reproduced exactly"
    return (
        f"the loss on record is {result['recorded_loss']}: NOT reproduced. Losses agree to rounding where the number "
        "of processes, engine or machine differ; otherwise the cause was not in data and weights (a faulty device)"
    )


def _rank(sample: dict[str, Any]) -> tuple[int, float]:
    loss = sample["loss"]
    return (0, 0.0) if isinstance(loss, str) else (1, -loss if loss is not None else 0.0)


def _where(provenance: Any) -> str:
    if isinstance(provenance, str):
        return provenance
    pieces = [" ".join(f"{name} {value}" for name, value in piece.items()) for piece in provenance[:3]]
    return "; ".join(pieces) + (f"; {len(provenance) - 3} more" if len(provenance) > 3 else "")
