"""The verb ``pretrain data``: prepare, inspect and verify datasets. Imports nothing heavy until a verb
runs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipeline.prepare.text import PrepareReport, Progress

_EXIT_FAILED, _EXIT_INVALID = 1, 2
_SKIPPED_SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verbs of ``pretrain data`` to ``parser``."""
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    prepare = verbs.add_parser("prepare", help="turn files into a dataset")
    kinds = prepare.add_subparsers(dest="data_kind", required=True, metavar="KIND")
    text = kinds.add_parser("text", help="UTF-8 files of a folder, one document each")
    text.add_argument("source", help="folder of text files")
    text.add_argument("--pattern", default="**/*", help="glob of the files to take (default: %(default)s)")
    stdlib = kinds.add_parser("stdlib", help="the source files of Python's standard library (about 12 MB)")
    for kind in (text, stdlib):
        kind.add_argument("out", help="folder to create")
        kind.add_argument("--tokenizer", help="a tokenizer.json to use instead of training one")
        kind.add_argument("--vocab-size", type=int, default=4096, help="ids to train (default: %(default)s)")
        kind.add_argument(
            "--validation-fraction",
            type=float,
            default=0.02,
            help="share of bytes to hold out (default: %(default)s)",
        )
        kind.add_argument("--block-tokens", type=int, help="tokens in a block (default: by the size of the set)")
        kind.add_argument("--shard-bytes", type=int, default=1 << 28, help="size of a shard (default: %(default)s)")
        kind.add_argument("--workers", type=int, help="tokenising processes (default: usable cores)")
        kind.add_argument("--seed", type=int, default=0, help="keys the split and the shuffle (default: %(default)s)")
        kind.add_argument("--force", action="store_true", help="replace a dataset that is already there")
    inspect = verbs.add_parser("inspect", help="print what a dataset holds")
    inspect.add_argument("path", help="dataset folder")
    verify = verbs.add_parser("verify", help="re-hash every shard and report all damage")
    verify.add_argument("path", help="dataset folder")


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb; returns the exit code (0 done, 2 invalid input or damaged data, 1 other
    failure)."""
    verb: Callable[[argparse.Namespace], int] = {
        "prepare": _prepare,
        "inspect": _inspect,
        "verify": _verify,
    }[args.data_verb]
    try:
        return verb(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_INVALID
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return _EXIT_FAILED


def _prepare(args: argparse.Namespace) -> int:
    from data_pipeline.prepare.text import PrepareOptions, prepare_stdlib, prepare_text

    options = PrepareOptions(
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        validation_fraction=args.validation_fraction,
        block_tokens=args.block_tokens,
        shard_bytes=args.shard_bytes,
        seed=args.seed,
    )
    with _progress() as progress:
        if args.data_kind == "stdlib":
            report = prepare_stdlib(
                args.out, options=options, workers=args.workers, force=args.force, progress=progress
            )
        else:
            report = prepare_text(
                args.source,
                args.out,
                pattern=args.pattern,
                options=options,
                workers=args.workers,
                force=args.force,
                progress=progress,
            )
    _print_report(report)
    return 0


def _print_report(report: PrepareReport) -> None:
    manifest = report.manifest
    if report.reused:
        print(f"{manifest.folder} already holds exactly this dataset; nothing to do")
    else:
        tokens = sum(split["tokens"] for split in manifest.content["splits"].values())
        rate = tokens / max(report.tokenize_seconds, 1e-9)
        print(f"wrote {manifest.folder} in {report.seconds:.1f} s ({rate / 1e6:.2f} M tokens/s tokenised)")
    _print_summary(report.manifest.folder)


def _print_summary(folder: object, skipped_shown: int = _SKIPPED_SHOWN) -> None:
    from data_pipeline.store.manifest import Manifest

    manifest = Manifest.load(str(folder))
    content, skipped = manifest.content, manifest.origin["skipped"]
    for name, split in content["splits"].items():
        print(
            f"  {name:<11} {split['documents']:>9,} documents {split['tokens']:>13,} tokens "
            f"{split['bytes']:>14,} bytes {split['blocks']:>7,} blocks {len(split['shards']):>5,} shards"
        )
    print(
        f"  vocabulary {manifest.vocab_size:,}; blocks of {content['block_tokens']:,} tokens; "
        f"{content['num_lanes']:,} lanes recommended; fingerprint {manifest.fingerprint}"
    )
    print(f"  {len(skipped):,} files skipped" + (":" if skipped else ""))
    for item in skipped[:skipped_shown]:
        print(f"    {item['path']}: {item['why']}")
    if len(skipped) > skipped_shown:
        print(f"    and {len(skipped) - skipped_shown:,} more (pretrain data inspect {manifest.folder})")


def _inspect(args: argparse.Namespace) -> int:
    from data_pipeline.store.manifest import Manifest

    manifest = Manifest.load(args.path)
    print(f"{manifest.folder}: {manifest.origin['corpus']}, from {manifest.origin['root']}")
    _print_summary(manifest.folder, skipped_shown=len(manifest.origin["skipped"]))
    print("  options " + " ".join(f"{name}={value}" for name, value in manifest.origin["options"].items()))
    for split in manifest.content["splits"].values():
        for shard in split["shards"]:
            print(f"  {shard['name']} {shard['size']:>14,} bytes {shard['tokens']:>13,} tokens")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from data_pipeline.store.manifest import Manifest
    from data_pipeline.store.verify import find_damage

    faults = find_damage(args.path)
    for fault in faults:
        print(fault)
    shards = sum(len(split["shards"]) for split in Manifest.load(args.path).content["splits"].values())
    print(f"{shards} shards checked: {len(faults)} faults" if faults else f"{shards} shards checked: all sound")
    return _EXIT_INVALID if faults else 0


@contextmanager
def _progress() -> Iterator[Progress]:
    """Progress on stderr: a rich bar on a terminal, else a line per phase and at each further quarter of
    it."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress as Bar

        with Bar(console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, object] = {}

            def show(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=total)
                bar.update(tasks[phase], completed=done)  # type: ignore[arg-type]

            yield show
        return
    reached: dict[str, int] = {}
    started = time.monotonic()

    def log(phase: str, done: int, total: int) -> None:
        quarter = 4 * done // max(total, 1)
        if reached.get(phase) != quarter:
            reached[phase] = quarter
            print(
                f"[{time.monotonic() - started:6.1f} s] {phase}: {25 * quarter} %",
                file=sys.stderr,
                flush=True,
            )

    yield log
