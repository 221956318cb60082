"""``pretrain data prepare images``, ``latents`` and ``interleaved``: media in, a dataset of samples out."""

from __future__ import annotations

import argparse
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
        kind.add_argument("--task", type=int, help="number of this task of --tasks, from 0")
        kind.add_argument("--tasks", type=int, help="tasks that share the work, such as a Slurm array")
        kind.add_argument("--force", action="store_true", help="replace a dataset that is already there")


def run(args: argparse.Namespace) -> int:
    """Prepare what ``args`` ask for; returns the exit code."""
    from data_pipeline.commands.progress import show_progress
    from data_pipeline.prepare.media.options import MediaOptions
    from data_pipeline.prepare.media.prepare import prepare_media
    from data_pipeline.prepare.workspace import Task

    if (args.task is None) != (args.tasks is None):
        raise ValueError("--task and --tasks must be given together")
    names = set(MediaOptions.__dataclass_fields__) - {"kind", "shape"}
    chosen = {name: getattr(args, name) for name in names if hasattr(args, name)}
    options = MediaOptions(kind=args.data_kind, shape=_shape(getattr(args, "shape", None)), **chosen)
    task = None if args.task is None else Task(args.task, args.tasks)
    with show_progress() as show:
        report = prepare_media(
            args.source,
            args.out,
            options,
            workers=args.workers,
            task=task,
            force=args.force,
            progress=lambda status: show(status.phase, status.done, status.total),
        )
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
        print(f"done for now in {report.seconds:.1f} s: {report.waiting}")
        return
    if report.reused:
        print(f"{manifest.location} already holds exactly this dataset; nothing to do")
    else:
        print(f"wrote {manifest.location} in {report.seconds:.1f} s")
    print_summary(manifest)
    for reason, count in manifest.origin["dropped"].items():
        print(f"  dropped {count:>9,} {reason}")
