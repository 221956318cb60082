"""The preflight: every concern in one table, all of them looked at together. Torch-free.

A concern is a module that offers ``check(subject) -> Iterator[Finding]``, one line of :data:`CONCERNS`, and nothing
else. It starts nothing, changes nothing that stays, and is done in seconds.
"""

from __future__ import annotations

import dataclasses
import importlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pretrain.planning.preflight.findings import Finding, Findings, unknown, warning
from pretrain.planning.preflight.subject import Subject

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.config.check import Judgement
    from pretrain.config.schema import Config
    from pretrain.config.violation import Violation

DEADLINE_S = 60.0
"""Seconds for all concerns together: a file system or server that does not answer must not hold up the command."""


class Concern(NamedTuple):
    """The module, and the nodes of the configuration that it reads: where one of them is faulty by itself, nothing
    can be said."""

    module: str
    needs: tuple[str, ...] = ()


_PACKAGE = "pretrain.planning.preflight"
CONCERNS: dict[str, Concern] = {
    "configuration": Concern(f"{_PACKAGE}.configuration"),
    "data": Concern(f"{_PACKAGE}.data", ("data", "train")),
    "vocabulary": Concern(f"{_PACKAGE}.vocabulary", ("data", "model")),
    "run root": Concern(f"{_PACKAGE}.storage", ("run",)),
    "checkpoint disk": Concern(f"{_PACKAGE}.disk", ("run", "train", "model", "optimizer")),
    "host memory": Concern(f"{_PACKAGE}.host_memory", ("train", "model", "optimizer", "engine", "launcher", "cluster")),
    "time": Concern(f"{_PACKAGE}.walltime", ("run", "train", "launcher", "lifecycle")),
    "tracking": Concern(f"{_PACKAGE}.tracking", ("tracking",)),
    "cluster": Concern(f"{_PACKAGE}.cluster", ("launcher", "cluster")),
}


def preflight(
    tree: Mapping[str, Any],
    config: Config,
    run_dir: RunDir | None = None,
    *,
    path: Path | None = None,
    concerns: Mapping[str, Concern] = CONCERNS,
    deadline_s: float = DEADLINE_S,
) -> Findings:
    """Look at a checked configuration before it is run (``run_dir`` None; ``path`` is its folder to be, None: one below
    ``run.root``) or continued; raises nothing."""
    return examine(Subject(tree, config, run_dir, path), concerns, deadline_s)


def preflight_of_faulty(
    tree: Mapping[str, Any],
    judgement: Judgement,
    run_dir: RunDir | None = None,
    path: Path | None = None,
) -> Findings:
    """The same for a tree that the check refuses: its faults are among the findings, and so is all else that can be
    said of the sound part."""
    subject = Subject(tree, judgement.config, run_dir, path, judgement.violations, judgement.unusable)
    return examine(subject, CONCERNS, DEADLINE_S)


def faults_only(violations: Sequence[Violation]) -> Findings:
    """Where nothing could be composed: its faults are all there is to say."""
    from pretrain.planning.preflight.configuration import faults

    return Findings(tuple(dataclasses.replace(fault, concern="configuration") for fault in faults(violations)))


def examine(subject: Subject, concerns: Mapping[str, Concern], deadline_s: float) -> Findings:
    """All findings of all concerns, which are looked at side by side."""
    looks = [_Look(name, concern, subject) for name, concern in concerns.items()]
    for look in looks:
        look.start()
    end = time.monotonic() + deadline_s
    for look in looks:
        look.join(max(0.0, end - time.monotonic()))
    return Findings(tuple(finding for look in looks for finding in look.outcome(deadline_s)))


class _Look(threading.Thread):
    """One concern on a thread of its own, which may be left behind: it does not keep the process alive."""

    def __init__(self, name: str, concern: Concern, subject: Subject) -> None:
        super().__init__(name=f"preflight-{name}", daemon=True)
        self._concern_name = name
        self._concern = concern
        self._subject = subject
        self._found: list[Finding] = []

    def run(self) -> None:
        faulty = sorted(self._subject.unusable.intersection(self._concern.needs))
        if faulty:
            self._found.append(unknown(", ".join(faulty), "not looked at: these nodes have faults; see configuration"))
            return
        try:
            check = importlib.import_module(self._concern.module).check
            for finding in check(self._subject):
                self._found.append(finding)
        except Exception as fault:  # a broken check must not keep a sound run from starting
            text = f"could not be checked: {type(fault).__name__}: {fault}"
            self._found.append(warning(self._concern_name, text, "an answer", "report this; the run is not affected"))

    def outcome(self, deadline_s: float) -> Iterator[Finding]:
        """What was found so far, and a warning when that is not all."""
        is_alive = self.is_alive()
        for finding in list(self._found):
            yield dataclasses.replace(finding, concern=self._concern_name)
        if is_alive:
            yield dataclasses.replace(
                warning(
                    self._concern_name,
                    f"no answer within {deadline_s:.0f} s",
                    "an answer in seconds",
                    "look whether the file system, server or Slurm controller behind it answers at all",
                ),
                concern=self._concern_name,
            )
