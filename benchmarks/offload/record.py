"""The file of results: one cell for each arm, size and number of tokens, written whenever a cell gains a round."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from results_file import hardware

MEASURED = "measured"
FUNCTION_CHECK = "function check"
NOT_MEASURED = "not measured"
FAILED = "failed"

_PACKAGES = ("torch", "deepspeed", "triton", "numpy")
_FACTS = """
import json, torch
found = {"cuda": torch.version.cuda, "threads": torch.get_num_threads()}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"gpu": properties.name, "gpu_bytes": properties.total_memory}
print(json.dumps(found))
"""


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU and its driver. Asked in a process of its own: looking takes device memory."""
    # torch's own words go to the error stream.
    answer = subprocess.run([sys.executable, "-c", _FACTS], capture_output=True, text=True, check=True)
    facts: dict[str, Any] = {**hardware(), "host_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    facts |= {"gpu": None, "gpu_bytes": 0, **json.loads(answer.stdout.splitlines()[-1])}
    if facts["gpu"]:
        query = [
            "nvidia-smi",
            "--query-gpu=driver_version,pcie.link.gen.max,pcie.link.width.max",
            "--format=csv,noheader",
        ]
        try:
            facts["driver_and_link"] = subprocess.run(query, capture_output=True, text=True).stdout.strip() or None
        except OSError:
            facts["driver_and_link"] = None
    return facts


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Record:
    """``path`` and its content.

    Raises:
        ValueError: what is to be continued was measured otherwise, or what is there would be lost.
    """

    def __init__(
        self, path: Path, facts: Mapping[str, Any], arguments: Mapping[str, Any], command: str, *, resume: bool
    ) -> None:
        self.path = path
        same = {"machine": dict(facts), "versions": versions(), "arguments": dict(arguments)}
        self.data: dict[str, Any] = {"benchmark": "offload", **same, "commands": [], "cells": {}}
        if path.exists():
            old = json.loads(path.read_text())
            # Function checks are no loss.
            is_measured = any(cell["status"] == MEASURED for cell in old["cells"].values())
            differing = _difference(old, same)
            if is_measured and not resume:
                raise ValueError(
                    f"{path} holds measured cells: go on with them by --resume, or delete it or name another by --out"
                )
            if is_measured and differing is not None:
                raise ValueError(
                    f"{path} was measured with {differing}, and its rows would not compare: continue it where it was "
                    "begun with the same arguments, or name another file by --out"
                )
            if resume and differing is None:
                self.data = old
        self.data["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
        if command not in self.data["commands"]:
            self.data["commands"].append(command)

    def cell(self, arm: str, size: str, tokens: int) -> dict[str, Any]:
        """That cell, made when it is not there yet."""
        cell: dict[str, Any] = self.data["cells"].setdefault(
            f"{size}/{tokens}/{arm}",
            {"arm": arm, "size": size, "tokens": tokens, "status": NOT_MEASURED, "reason": "not run", "rounds": []},
        )
        return cell

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first thing in which a file differs from this run."""
    for block in ("machine", "versions", "arguments"):
        for name in sorted(old[block].keys() | new[block].keys()):
            before, now = old[block].get(name), new[block].get(name)
            if before != now:
                return f"{block} {name} = {before!r}, here it is {now!r}"
    return None


def summary(cell: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each phase and the iteration median and quartiles over all steps of all rounds, milliseconds."""
    found = {}
    for name in ("forward", "backward", "update", "iteration"):
        values = [value for one in cell["rounds"] for value in one["milliseconds"][name]]
        if values:
            low, median, high = statistics.quantiles(
                values * 2 if len(values) == 1 else values, n=4, method="inclusive"
            )
            found[name] = {"low": low, "median": median, "high": high}
    return found


def loss_difference(cell: Mapping[str, Any], reference: Mapping[str, Any] | None) -> float | None:
    """The most by which a loss differs from that of the reference in the same step, nats; None without both."""
    if not cell["rounds"] or reference is None or not reference["rounds"]:
        return None
    pairs = zip(cell["rounds"][0]["losses"], reference["rounds"][0]["losses"], strict=False)
    return max(abs(mine - its) for mine, its in pairs)


def repeats(rounds: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rounds had the same losses, bit for bit."""
    return all(one["losses"] == rounds[0]["losses"] for one in rounds)
