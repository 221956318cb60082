"""``pretrain data index``: sidecars and a manifest for shards that another program wrote."""

from __future__ import annotations

import argparse
import sys

_EXIT_INVALID = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``index`` to ``parser``."""
    parser.add_argument("folder", help="folder that holds the tar files; they are only read")
    parser.add_argument(
        "--kind",
        default="foreign",
        choices=("foreign", "images", "latents"),
        help="what a sample is: images and latents also record sizes (default: %(default)s)",
    )
    parser.add_argument("--pattern", default="*.tar", help="glob of the shards (default: %(default)s)")
    parser.add_argument("--validation", metavar="GLOB", help="shards to hold out (default: none)")
    parser.add_argument(
        "--optional", action="append", default=[], metavar="EXT", help="extension that samples may lack (repeatable)"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="EXT", help="further extension to admit (repeatable)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: usable cores)")
    parser.add_argument("--force", action="store_true", help="replace an index that is already there")
    parser.add_argument("--append", action="store_true", help="add new shards to the index that is there")


def run(args: argparse.Namespace) -> int:
    """Index the folder; prints every fault; returns the exit code."""
    from data_pipeline.commands.progress import show_progress
    from data_pipeline.commands.summary import print_summary
    from data_pipeline.store.indexing import IndexFaultsError, IndexOptions, index_folder
    from data_pipeline.wording import counted

    options = IndexOptions(
        kind=args.kind,
        pattern=args.pattern,
        validation=args.validation,
        optional=tuple(args.optional),
        allow=tuple(args.allow),
    )
    try:
        with show_progress() as progress:
            report = index_folder(
                args.folder,
                options,
                workers=args.workers,
                force=args.force,
                append=args.append,
                progress=progress,
            )
    except IndexFaultsError as error:
        for fault in error.faults:
            print(fault)
        print(f"error: {counted(len(error.faults), 'fault')}; nothing was written", file=sys.stderr)
        return _EXIT_INVALID
    manifest = report.manifest
    if report.reused:
        print(f"{manifest.location} already has exactly this index; nothing to do")
    else:
        samples = sum(split["samples"] for split in manifest.content["splits"].values())
        rate = samples / max(report.seconds, 1e-9)
        print(f"indexed {manifest.location} in {report.seconds:.1f} s ({rate:,.0f} samples/s)")
    print_summary(manifest)
    return 0
