"""``pretrain data prepare images``, ``latents`` and ``interleaved``: media in, a dataset of samples out."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.prepare.media.prepare import MediaReport

_HELP = {
    "images": "images with captions: folders, WebDataset tars or Parquet files",
    "latents": "precomputed .npy latents with conditioning: folders, WebDataset tars or Parquet files",
    "interleaved": "documents of text, images and speech: JSONL files or WebDataset tars",
}


def add_kinds(kinds: Any) -> None:
    """Add the kinds ``images``, ``latents`` and ``interleaved`` to the subparsers of ``prepare``."""
    for name, text in _HELP.items():
        kind = kinds.add_parser(name, help=text)
        kind.add_argument("source", nargs="+", help="folder, file, glob or (tars and Parquet) URL")
        kind.add_argument("out", help="folder to create")
        kind.add_argument("--tokenizer", help="a tokenizer.json for captions and text")
        if name == "interleaved":
            kind.add_argument(
                "--vocab-size", type=int, default=4096, help="ids to train without --tokenizer (default: %(default)s)"
            )
        else:
            kind.add_argument(
                "--captions",
                choices=("required", "optional", "none"),
                default="required",
                help="drop samples without one, give them an empty one, or keep none (default: %(default)s)",
            )
            kind.add_argument("--caption-column", default="caption", help="of Parquet files (default: %(default)s)")
        if name == "latents":
            kind.add_argument("--shape", help="C,H,W that latents must have (default: that of the first)")
            kind.add_argument("--latent-column", default="latent", help="of Parquet files (default: %(default)s)")
            kind.add_argument("--conditioning-column", default="cond", help="of Parquet files (default: %(default)s)")
            kind.add_argument("--label-column", default="label", help="of Parquet files (default: %(default)s)")
        else:
            if name == "images":
                kind.add_argument("--image-column", default="image", help="of Parquet files (default: %(default)s)")
            kind.add_argument("--min-side", type=int, default=1, help="drop smaller images (pixels)")
            kind.add_argument(
                "--max-pixels", type=int, default=1 << 26, help="drop larger images (default: %(default)s)"
            )
        if name == "interleaved":
            kind.add_argument("--max-seconds", type=float, default=3600.0, help="drop longer recordings")
        kind.add_argument("--max-bytes", type=int, default=1 << 26, help="drop larger files (default: %(default)s)")
        kind.add_argument(
            "--validation-fraction",
            type=float,
            default=0.02,
            help="share of samples held out (default: %(default)s)",
        )
        kind.add_argument("--shard-bytes", type=int, default=1 << 28, help="size of a shard (default: %(default)s)")
        kind.add_argument("--segment-bytes", type=int, help="size of a segment (default: by the size of the set)")
        kind.add_argument("--workers", type=int, help="processes (default: usable cores)")
        kind.add_argument("--seed", type=int, default=0, help="keys the split and the shuffle (default: %(default)s)")
        kind.add_argument("--task", type=int, metavar="K", help="do share K (from 0) of the work; needs --tasks")
        kind.add_argument("--tasks", type=int, metavar="N", help="number of shares")
        kind.add_argument("--array", action="store_true", help="take K and N from the Slurm array that this runs in")
        kind.add_argument("--force", action="store_true", help="replace a dataset that is already there")


def run(args: argparse.Namespace) -> int:
    """Prepare what ``args`` ask for; returns the exit code."""
    from data_pipeline.commands.prepare_text import EXIT_TASKS_UNFINISHED, task_of
    from data_pipeline.commands.text_progress import show_text_progress
    from data_pipeline.prepare.media.options import MediaOptions
    from data_pipeline.prepare.media.prepare import prepare_media

    names = set(MediaOptions.__dataclass_fields__) - {"kind", "shape"}
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    options = MediaOptions(kind=args.data_kind, shape=_shape(getattr(args, "shape", None)), **chosen)
    task = task_of(args, os.environ)
    with show_text_progress() as progress:
        report = prepare_media(
            args.source, args.out, options, workers=args.workers, task=task, force=args.force, progress=progress
        )
    if report.waiting:
        way_out = "What to do: when those tasks have ended, run this again; what is done is not done again."
        print(f"unfinished: {report.waiting}. {way_out}", file=sys.stderr)
        return EXIT_TASKS_UNFINISHED
    _print_report(report)
    return 0


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape {text!r} is not of the form C,H,W") from None


def _print_report(report: MediaReport) -> None:
    from data_pipeline.commands.summary import print_summary

    manifest = report.manifest
    if manifest is None:
        print("all shards are written; to finish, run the same command without --task, --tasks and --array")
        return
    if report.reused:
        print(f"{manifest.location} already holds exactly this dataset; nothing to do")
    else:
        print(f"wrote {manifest.location} in {report.seconds:.1f} s")
    print_summary(manifest)
