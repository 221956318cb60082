"""``pretrain data prepare text`` and ``stdlib``: text in, a text dataset out."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.prepare.text import PrepareReport
    from data_pipeline.prepare.workspace import Task

EXIT_TASKS_UNFINISHED = 75
"""Other tasks have work left; run them again (75 is EX_TEMPFAIL of sysexits.h)."""


def add_kinds(kinds: Any) -> None:
    """Add the kinds ``text`` and ``stdlib`` to the subparsers of ``prepare``."""
    text = kinds.add_parser("text", help="plain files, JSONL or Parquet: from folders, files, globs or URLs")
    text.add_argument("source", nargs="+", help="folder, file, glob (quoted), or URL of one (s3://, https://, ...)")
    stdlib = kinds.add_parser("stdlib", help="the source files of Python's standard library (about 12 MB)")
    for kind in (text, stdlib):
        kind.add_argument("out", help="folder to create")
    _add_input_arguments(text)
    for kind in (text, stdlib):
        _add_dataset_arguments(kind)
    _add_sharing_arguments(text)


def _add_input_arguments(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--pattern", default="**/*", help="glob of the files to take from folders (default: %(default)s)")
    kind.add_argument(
        "--format",
        default="auto",
        choices=("auto", "text", "jsonl", "parquet"),
        help="of all files; text is one document a file (default: by name: .jsonl, .parquet, else text; each but "
        "Parquet may be .gz or .zst)",
    )
    kind.add_argument(
        "--text-field", default="text", help="field or column of the text in JSONL and Parquet (default: %(default)s)"
    )
    kind.add_argument("--deduplicate", action="store_true", help="keep one of several equal documents")


def _add_dataset_arguments(kind: argparse.ArgumentParser) -> None:
    kind.add_argument("--tokenizer", help="a tokenizer.json to use instead of training one")
    kind.add_argument("--vocab-size", type=int, default=4096, help="ids to train (default: %(default)s)")
    kind.add_argument(
        "--validation-fraction",
        type=float,
        default=0.02,
        help="share of bytes to hold out (default: %(default)s)",
    )
    kind.add_argument("--block-tokens", type=int, help="tokens in a block (default: by the size of the set)")
    kind.add_argument(
        "--shard-bytes", type=int, default=1 << 28, help="about the size of a shard (default: %(default)s)"
    )
    kind.add_argument("--workers", type=int, help="processes (default: usable cores)")
    kind.add_argument("--seed", type=int, default=0, help="keys the split and the shuffle (default: %(default)s)")
    kind.add_argument(
        "--tokenizer-backend",
        default="auto",
        choices=("auto", "hf", "gigatoken"),
        help="a fast one is used only where it gives the same ids as hf (default: %(default)s)",
    )
    kind.add_argument("--force", action="store_true", help="replace a dataset or unfinished work that is already there")


def _add_sharing_arguments(kind: argparse.ArgumentParser) -> None:
    kind.add_argument(
        "--append", action="store_true", help="add the documents to the dataset that is there, in new shards"
    )
    kind.add_argument("--task", type=int, metavar="K", help="do share K (from 0) of the work; needs --tasks")
    kind.add_argument("--tasks", type=int, metavar="N", help="number of shares")
    kind.add_argument("--array", action="store_true", help="take K and N from the Slurm array that this runs in")
    kind.add_argument("--finish", action="store_true", help="do no work but what comes last; say what is missing")
    kind.add_argument("--piece-bytes", type=int, help="input of one unit of work (default: by the size of the input)")


def run(args: argparse.Namespace) -> int:
    """Prepare what ``args`` ask for; returns the exit code."""
    from data_pipeline.commands.text_progress import show_text_progress
    from data_pipeline.prepare.text import PrepareOptions, UnfinishedTasksError, prepare_stdlib, prepare_text

    of_text = args.data_kind == "text"
    options = PrepareOptions(
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        validation_fraction=args.validation_fraction,
        block_tokens=args.block_tokens,
        shard_bytes=args.shard_bytes,
        seed=args.seed,
        **({"text_field": args.text_field, "deduplicate": args.deduplicate} if of_text else {}),
    )
    common: dict[str, Any] = {
        "options": options,
        "workers": args.workers,
        "force": args.force,
        "backend": args.tokenizer_backend,
    }
    try:
        with show_text_progress() as progress:
            if not of_text:
                report = prepare_stdlib(args.out, progress=progress, **common)
            else:
                report = prepare_text(
                    args.source,
                    args.out,
                    pattern=args.pattern,
                    file_format=args.format,
                    progress=progress,
                    task=task_of(args, os.environ),
                    finish_only=args.finish,
                    append=args.append,
                    piece_bytes=args.piece_bytes,
                    **common,
                )
    except UnfinishedTasksError as error:
        print(f"unfinished: {error}", file=sys.stderr)
        return EXIT_TASKS_UNFINISHED
    _print_report(report, args.tokenizer_backend)
    return 0


def task_of(args: argparse.Namespace, environment: Any) -> Task | None:
    """The share of the work that the options or the Slurm array ask for; None for all of it.

    Raises ValueError for half an option, a share out of range, or ``--array`` outside an array.
    """
    from data_pipeline.prepare.workspace import Task

    if args.array:
        if args.task is not None or args.tasks is not None:
            raise ValueError("--array and --task/--tasks exclude each other")
        try:
            number, first, step, count = (
                int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("ID", "MIN", "STEP", "COUNT")
            )
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"--array: {error.args[0]} is not set to a number. What to do: submit with sbatch --array=0-15, or "
                "give --task and --tasks."
            ) from None
        return Task((number - first) // step, count)
    if (args.task is None) != (args.tasks is None):
        raise ValueError("--task and --tasks go together: --task 0 --tasks 4 is the first of four shares")
    return None if args.task is None else Task(args.task, args.tasks)


def _print_report(report: PrepareReport, wanted_backend: str) -> None:
    from data_pipeline.commands.summary import print_summary

    manifest, origin = report.manifest, report.manifest.origin
    origin = origin["appended"][-1] if "appended" in origin else origin
    if report.reused:
        print(f"{manifest.folder} already holds exactly this dataset; nothing to do")
    else:
        rate = report.counts.tokens / max(report.tokenize_seconds, 1e-9)
        print(f"wrote {manifest.folder} in {report.seconds:.1f} s ({rate / 1e6:.2f} M tokens/s tokenised)")
        if origin["tokenizer_backend"] != "hf" or wanted_backend != "hf":
            print(f"  tokeniser {origin['tokenizer_backend']}: {origin['tokenizer_backend_why']}")
    print_summary(manifest)
