"""What a preflight found, and how it is shown. Torch-free."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TextIO


class Level(StrEnum):
    """How much a finding weighs. Only ``ERROR`` keeps a run from starting; ``UNKNOWN`` is what could not be found out
    and is no reason to stop."""

    ERROR = "error"
    WARNING = "warning"
    UNKNOWN = "unknown"
    OK = "ok"


@dataclass(frozen=True)
class Finding:
    """One line of a preflight.

    ``what`` is the field, file or resource; ``expected`` the rule and ``fix`` the way out, both empty where nothing is
    wrong. ``figures`` are the numbers behind it, for programs (bytes, seconds, counts).
    """

    level: Level
    what: str
    found: str
    expected: str = ""
    fix: str = ""
    concern: str = ""
    figures: dict[str, float] = dataclasses.field(default_factory=dict)


def error(what: str, found: str, expected: str, fix: str, **figures: float) -> Finding:
    """A fault that would end the run."""
    return Finding(Level.ERROR, what, found, expected, fix, figures=figures)


def warning(what: str, found: str, expected: str, fix: str, **figures: float) -> Finding:
    """Something that the run may survive."""
    return Finding(Level.WARNING, what, found, expected, fix, figures=figures)


def unknown(what: str, found: str, fix: str = "", **figures: float) -> Finding:
    """What could not be found out, and why."""
    return Finding(Level.UNKNOWN, what, found, fix=fix, figures=figures)


def ok(what: str, found: str, **figures: float) -> Finding:
    """What was looked at and is well."""
    return Finding(Level.OK, what, found, figures=figures)


@dataclass(frozen=True)
class Findings:
    """All findings of a preflight, in the order of the concerns."""

    findings: tuple[Finding, ...]

    def of(self, level: Level) -> tuple[Finding, ...]:
        """Those of one level."""
        return tuple(finding for finding in self.findings if finding.level is level)

    @property
    def errors(self) -> tuple[Finding, ...]:
        return self.of(Level.ERROR)

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return self.of(Level.WARNING)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against starting."""
        return not self.errors

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``passed``, the number of each level, and all findings."""
        return {
            "passed": self.passed,
            **{f"{level}s" if level is not Level.OK else "ok": len(self.of(level)) for level in Level},
            "findings": [{**dataclasses.asdict(finding), "level": str(finding.level)} for finding in self.findings],
        }


class PreflightError(ValueError):
    """A preflight found errors. ``findings`` holds everything it found."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        lines = blocks(findings.errors)
        count = len(findings.errors)
        head = f"preflight found {count} error{'s' if count != 1 else ''}; nothing was started:"
        super().__init__("\n".join([head, *lines, "`--force` starts all the same."]))


def blocks(findings: Iterable[Finding]) -> list[str]:
    """Lines of findings with their rule and way out, one block each."""
    lines = []
    for finding in findings:
        lines.append(f"  {finding.what}  ({finding.concern})")
        for name in ("found", "expected", "fix"):
            if text := getattr(finding, name):
                lines.append(f"    {name:<8}  {_column(text)}")
        lines.append("")
    return lines


def stop_on_errors(findings: Findings, force: bool = False, stream: TextIO | None = None) -> None:
    """What a command does with a preflight before it starts a run: warnings go to ``stream`` (None: standard error),
    errors end it.

    Raises:
        PreflightError: there are errors, and not ``force``; with it they are printed like warnings.
    """
    out = stream or sys.stderr
    if findings.warnings:
        print("\n".join(["preflight warns:", *blocks(findings.warnings)]).rstrip(), file=out, flush=True)
    if findings.errors and not force:
        raise PreflightError(findings)
    if findings.errors:
        lines = ["preflight found errors; started all the same, by --force:", *blocks(findings.errors)]
        print("\n".join(lines).rstrip(), file=out, flush=True)


def show(findings: Findings, stream: TextIO | None = None) -> None:
    """Print everything: a table of what is well or unknown, then warnings, then errors, then the verdict."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out = stream or sys.stdout
    # Piped output has no width of its own; 80 columns would fold every row.
    console = Console(file=out, width=None if out.isatty() else max(140, shutil.get_terminal_size((140, 25)).columns))
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "", "status", "found"):
        table.add_column(heading, overflow="fold")
    styles = {Level.ERROR: "red", Level.WARNING: "yellow", Level.UNKNOWN: "dim", Level.OK: "green"}
    before = ""
    for finding in findings.findings:
        table.add_row(
            Text(finding.concern if finding.concern != before else "", style="bold"),
            Text(finding.what),
            Text(str(finding.level), style=styles[finding.level]),
            Text(finding.found if finding.level in (Level.OK, Level.UNKNOWN) else "see below"),
        )
        before = finding.concern
    console.print(table)
    for heading, found in (("warnings", findings.warnings), ("errors", findings.errors)):
        if found:
            console.print()
            console.print(Text(f"{heading}:", style=styles[found[0].level]))
            console.print(Text("\n".join(blocks(found)).rstrip()), soft_wrap=True)
    counts = [
        f"{len(found)} {name}{'s' if len(found) != 1 else ''}"
        for name, found in (("error", findings.errors), ("warning", findings.warnings))
    ]
    verdict = "nothing speaks against starting" if findings.passed else "the run would not start"
    console.print()
    console.print(Text(f"{', '.join(counts)}: {verdict}", style="green" if findings.passed else "red"))


def _column(text: str) -> str:
    return text.replace("\n", "\n" + " " * 14)
