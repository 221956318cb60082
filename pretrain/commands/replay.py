"""``pretrain replay``: run one step of a run again, on this machine, and show what it is made of."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.freeze import Difference
    from pretrain.config.schema import Config
    from pretrain.training.replay_target import ReplayTarget

_SHOWN_GRADIENTS = 12
_SHOWN_TEXT = 300
_POLL_S = 0.25


_MAY_CHANGE = ("launcher", "engine", "data", "train.micro_batch_size", "train.activation_checkpointing")
_NEAR_S = 600.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from pretrain.commands.watching import add_root_argument

    parser.add_argument(
        "run_dir", metavar="RUN", help="run directory, or the name (or its unique beginning) of one; it is only read"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help="where and how it is replayed: launcher=local launcher.num_processes=1 engine.tensor_parallel=1 ...",
    )
    parser.add_argument("--step", type=int, required=True, help="step to run again, without its update")
    parser.add_argument("--batch", type=int, help="of several batches tried at the step (default: the last bad one)")
    parser.add_argument("--output", type=Path, help="new folder for the result (default: replay_RUN_step_N here)")
    add_root_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    from pretrain.training.failure import guarded

    return guarded(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    from launchers.local import start_ranks
    from launchers.run_dir import RunDir
    from launchers.watch.find import resolve_run
    from pretrain.config.freeze import dump
    from pretrain.training.replay import CONFIG_NAME, RESULT_NAME
    from pretrain.training.replay_target import replay_target

    source = RunDir.open(resolve_run(arguments.run_dir, arguments.root))
    global_batch = source.config()["train"]["global_batch_size"]
    target = replay_target(source, global_batch, arguments.step, arguments.batch)
    tree, config, differs = settings(source, target, arguments.overrides)
    num_devices = _num_devices(config.launcher.device)
    check_room(config, num_devices)
    output = (arguments.output or Path(f"replay_{source.path.name}_step_{arguments.step}")).absolute()
    _make_output(output, source.path)
    (output / CONFIG_NAME).write_text(dump(tree), encoding="utf-8")
    print(plan_of(target, config, num_devices), flush=True)
    program = [sys.executable, "-m", "pretrain.training.replay", str(source.path), "--step", str(target.step)]
    program += ["--batch", str(target.batch), "--output", str(output)]
    place = RunDir(output)
    with start_ranks(
        place,
        attempt=0,
        num_processes=config.launcher.num_processes,
        threads_per_process=config.launcher.threads_per_process,
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
    result = json.loads((output / RESULT_NAME).read_text(encoding="utf-8")) | {"differs": differs}
    (output / RESULT_NAME).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = describe(result)
    (output / "replay.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    print(f"\nwritten: {output / RESULT_NAME}, {output / 'replay.txt'}")
    return 0


def settings(
    source: RunDir, target: ReplayTarget, overrides: Sequence[str]
) -> tuple[dict[str, Any], Config, list[str]]:
    """Tree and configuration to replay with: those of the attempt that made the step, with ``overrides``.

    Also what differs from then, in words: a loss may differ because of it.

    Raises:
        ReplayError: an override changes what the step is made of.
        InvalidConfigError: another fault of an override.
    """
    from data_pipeline.quarantine import read_quarantine
    from launchers.provenance import package_versions
    from pretrain.config.check import check
    from pretrain.config.freeze import extend
    from pretrain.training.replay_target import ReplayError

    tree = source.config(target.revision)
    changes: list[Difference] = []
    if overrides:
        tree, changes = extend(tree, overrides)
    refused = [str(c) for c in changes if not f"{c.path}.".startswith(tuple(f"{name}." for name in _MAY_CHANGE))]
    if refused:
        raise ReplayError(
            f"{'; '.join(refused)}: a replay may change only fields of {', '.join(_MAY_CHANGE)}: others change the step"
        )
    differs = [str(change) for change in changes]
    if target.other_revisions:
        names = ", ".join(map(str, target.other_revisions))
        differs.append(
            f"steps since the checkpoint were made with other settings (revision {names}), here with those of "
            f"revision {target.revision}"
        )
    config = check(tree)
    if getattr(config.data, "on_damage", "stop") != "stop" and (members := read_quarantine(source.quarantine_path)):
        differs.append(
            f"rows of {len(members)} member(s) in quarantine are substituted, also where they were whole then"
        )
    then = source.recorded_versions(target.attempt) if target.attempt is not None else {}
    now = package_versions()
    differs += [
        f"{name} {then[name]} -> {now.get(name, 'missing')}"
        for name in ("pretrain", "torch", "numpy", "deepspeed", "megatron-core")
        if name in then and then[name] != now.get(name)
    ]
    return tree, config, differs


def check_room(config: Config, num_devices: int | None) -> None:
    """Refuse more processes than this machine has devices for (None: it computes on CPU). Raises ReplayError."""
    from pretrain.training.replay_target import ReplayError

    wanted = config.launcher.num_processes
    if num_devices is not None and wanted > num_devices:
        fewer = f"launcher=local launcher.num_processes={max(num_devices, 1)}"
        if not num_devices:
            fewer += " launcher.device=cpu"
        raise ReplayError(
            f"the step was made by {wanted} processes, one per GPU, and this machine has {num_devices}. Replay it with "
            f"fewer: add {fewer}, with a layout that fits (engine.tensor_parallel=1 engine.pipeline_parallel=1 or "
            "engine=deepspeed), or run this command where there are as many (inside an allocation: "
            f"srun --nodes=1 --ntasks=1 --gres=gpu:{wanted} pretrain replay ...). Losses then agree to rounding"
        )


def plan_of(target: ReplayTarget, config: Config, num_devices: int | None) -> str:
    """What is about to be done, and what it takes."""
    origin = f"checkpoint {target.checkpoint.name}" if target.checkpoint is not None else "the initial weights"
    wanted = config.launcher.num_processes
    devices = "on CPU" if num_devices is None else f"one GPU each of {num_devices}"
    lines = [
        f"replaying step {target.step} on batch {target.batch} from {origin}, {wanted} process(es)",
        f"settings: revision {target.revision}"
        + (f", of attempt {target.attempt}" if target.attempt is not None else "")
        + f"; needs on this machine: {wanted} process(es), {devices}",
    ]
    between = target.step - 1 - target.checkpoint_step
    if between:
        took = None if target.seconds is None else between * target.seconds
        about = "" if took is None else f", about {took / 60:.0f} min at the run's pace" if took >= 60 else ""
        far = between > config.train.checkpoint_interval or (took is not None and took > _NEAR_S)
        warn = f"warning: no nearer checkpoint before step {target.step} is left: " if far else ""
        lines.append(f"{warn}steps {target.checkpoint_step + 1}..{target.step - 1} are trained again first{about}")
    return "\n".join(lines)


def _num_devices(choice: str) -> int | None:
    """GPUs that ranks would compute on here; None: on CPU."""
    if choice == "cpu":
        return None
    import torch

    found = torch.cuda.device_count()
    return None if choice == "auto" and not found else found


def _make_output(output: Path, run: Path) -> None:
    from pretrain.training.replay_target import ReplayError

    if output.is_relative_to(run.absolute()):
        raise ReplayError(f"--output {output} lies in the run directory, which is only read; choose another folder")
    try:
        if output.exists() and any(output.iterdir()):
            raise ReplayError(f"--output {output} is not empty; choose another folder")
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReplayError(f"--output {output} cannot be made ({error.strerror}); choose another folder") from error


def describe(result: dict[str, Any]) -> str:
    """The result for reading."""
    origin = "the initial weights" if result["checkpoint"] is None else Path(result["checkpoint"]).name
    lines = [
        f"step {result['step']}, batch {result['batch']}: {len(result['samples'])} samples, "
        f"{result['targets']} targets",
        f"  from {origin}, {result['steps_advanced']} steps trained again; {result['processes']} process(es), "
        f"engine {result['engine']}, learning rate {result['learning_rate']:.4g}, "
        f"settings of revision {result['revision']}",
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
    differs = result.get("differs") or []
    if result["reproduced"] is None:
        return "the run has no loss on record for this step (train.log_interval)"
    if result["reproduced"]:
        return "the loss on record is reproduced exactly"
    words = f"the loss on record is {result['recorded_loss']}: NOT reproduced"
    if differs:
        return (
            f"{words}. Different from then, so it need not be: {'; '.join(differs)}. Processes and engine change "
            "roundings only"
        )
    return (
        f"{words}. Settings, layout and packages are those of then. Losses agree to rounding where the machine is of "
        "another kind, and data that have changed since are other data (pretrain data verify); otherwise the cause "
        "was not in data and weights (a faulty device)"
    )


def _rank(sample: dict[str, Any]) -> tuple[int, float]:
    loss = sample["loss"]
    return (0, 0.0) if isinstance(loss, str) else (1, -loss if loss is not None else 0.0)


def _where(provenance: Any) -> str:
    if isinstance(provenance, str):
        return provenance
    pieces = [" ".join(f"{name} {value}" for name, value in piece.items()) for piece in provenance[:3]]
    return "; ".join(pieces) + (f"; {len(provenance) - 3} more" if len(provenance) > 3 else "")
