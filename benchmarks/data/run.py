"""The benchmarks of the data pipeline against the libraries that one would use instead.

    python benchmarks/data/run.py [--only text,starting] [--quick] [--work FOLDER]

The first run gathers a corpus, trains a tokenizer, prepares the data set, makes the rivals' environments and converts
the data set for each; all of that stays in the work folder. Every sub-benchmark prints its table and goes into
``benchmarks/results/data.json`` beside those of earlier runs (with ``--quick`` or ``--no-record``: into ``trial.json``
in the work folder). What fails is told and does not end the others. README.md says what is measured and how each rival
was set up.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(_HERE.parent))

import corpus  # noqa: E402
import registry  # noqa: E402
import results_file  # noqa: E402
from environments import installed_version, python_of  # noqa: E402
from setting import Setting  # noqa: E402

# name: (module, function)
SECTIONS = {
    "text": ("text", "run"),
    "starting": ("starting", "run_starting"),
    "memory": ("starting", "run_memory"),
    "images": ("images", "run"),
    "preparing": ("preparing", "run_preparing"),
    "writing": ("preparing", "run_writing"),
}
_VERSIONS = {
    "project": (
        "webdataset",
        "megatron-core",
        "megatron-energon",
        "tokenizers",
        "simplejpeg",
        "opencv-python-headless",
    ),
    "litdata": ("litdata",),
    "mosaicml": ("mosaicml-streaming", "numpy"),
}


def main() -> None:
    arguments = _arguments()
    quick = arguments.quick
    setting = Setting(
        work=Path(arguments.work),
        rounds=arguments.rounds or (2 if quick else 5),
        seconds=arguments.seconds or (0.3 if quick else 1.0),
        quick=quick,
        corpus_mb=arguments.corpus_mb or (24 if quick else 320),
    )
    setting.work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    folder = setting.corpus()
    described = corpus.describe(folder)
    print(f"corpus: {described['documents']:,} documents, {int(str(described['bytes'])) / 1e6:.0f} MB in {folder}")
    dataset = setting.dataset()
    train = json.loads((dataset / "manifest.json").read_text())["content"]["splits"]["train"]
    print(f"data set: {train['tokens'] / 1e6:.1f} M tokens in {train['blocks']} blocks, {len(train['shards'])} shards")
    _make_environments(setting)
    setup = time.perf_counter() - started

    sections: dict[str, Any] = {}
    only = set(arguments.contenders.split(",")) if arguments.contenders else None
    for name in arguments.only.split(","):
        module, function = SECTIONS[name]
        began = time.perf_counter()
        try:
            figures = getattr(importlib.import_module(module), function)(setting, only)
        except Exception:
            traceback.print_exc()
            print(f"sub-benchmark {name} FAILED", file=sys.stderr)
            continue
        sections[name] = {
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            "command": shlex.join(["python", "benchmarks/data/run.py", *sys.argv[1:]]),
            "load_average_before": os.getloadavg()[2],
            "seconds": time.perf_counter() - began,
            **figures,
        }
    data = {"corpus": described, "train": {key: value for key, value in train.items() if key != "shards"}}
    _record(setting, sections, data, trial=quick or arguments.no_record)
    print(f"setting up took {setup:.0f} s, all of it {time.perf_counter() - started:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "pretrain-data-benchmark"
    parser.add_argument(
        "--work", default=str(default), help="folder for everything that is made (default: %(default)s)"
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sub-benchmarks (default: %(default)s)")
    parser.add_argument(
        "--contenders", help="modules of contenders/ to take, such as ours,litdata_tokens (default: all)"
    )
    parser.add_argument("--rounds", type=int, help="turns of each contender (default: 5)")
    parser.add_argument("--seconds", type=float, help="length of a turn (default: 1)")
    parser.add_argument("--corpus-mb", type=int, help="size of the corpus in MiB (default: 320)")
    parser.add_argument("--quick", action="store_true", help="a trial with small sizes; the record stays in --work")
    parser.add_argument(
        "--no-record", action="store_true", help="leave benchmarks/results alone; the record stays in --work"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(SECTIONS)}")
    return arguments


def _make_environments(setting: Setting) -> None:
    for name in registry.ENVIRONMENTS:
        try:
            python_of(setting.work, name)
        except Exception as error:
            # Its contenders will fail one by one, and say so.
            print(f"environment {name} cannot be made: {getattr(error, 'stderr', None) or error}", file=sys.stderr)


def _versions(setting: Setting) -> dict[str, dict[str, str]]:
    found = {}
    for environment, packages in _VERSIONS.items():
        try:
            python = python_of(setting.work, environment)
        except Exception:
            continue
        found[environment] = {package: installed_version(python, package) for package in packages}
    return found


def _record(setting: Setting, sections: dict[str, Any], data: dict[str, Any], trial: bool) -> None:
    """Newer sub-benchmarks replace older ones; the rest of an earlier record stays."""
    path = setting.work / "trial.json" if trial else results_file.RESULTS / "data.json"
    earlier = json.loads(path.read_text()).get("sections", {}) if path.exists() else {}
    figures = {
        "command": shlex.join(["python", "benchmarks/data/run.py", *sys.argv[1:]]),
        "data": data,
        "rivals": _versions(setting),
        "sections": earlier | sections,
    }
    if trial:
        path.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"written: {path}")
    elif sections:
        results_file.write_result("data", figures)


if __name__ == "__main__":
    main()
