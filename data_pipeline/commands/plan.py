"""``pretrain data plan``: pack on paper. Prints rows, fill and epochs, and leaves the plan beside the manifest."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``plan`` to ``parser``."""
    parser.add_argument("path", help="text dataset: folder or URL")
    parser.add_argument("--sequence-length", type=int, required=True, help="positions in a row")
    parser.add_argument("--num-lanes", type=int, help="lanes of the order (default: as the dataset recommends)")
    parser.add_argument("--packing", choices=("best_fit", "concatenate"), default="best_fit")
    parser.add_argument("--reserve-segments", type=int, default=0, help="segments to keep for lost rows (default: 0)")
    parser.add_argument("--samples", type=int, help="rows of a run: also print how many epochs they are")


def run(args: argparse.Namespace) -> int:
    """Make the plans of both splits and print what follows from them."""
    import time

    from data_pipeline.config import TextDataConfig
    from data_pipeline.text_source import TextSource

    config = TextDataConfig(
        path=args.path,
        sequence_length=args.sequence_length,
        num_lanes=args.num_lanes,
        packing=args.packing,
        reserve_segments=args.reserve_segments,
    )
    faults = [f"{where}: {found!r}: {rule}. What to do: {fix}" for where, found, rule, fix in config.violations()]
    if faults:
        raise ValueError("; ".join(faults))
    started = time.perf_counter()
    sources = config.build(seed=0)
    seconds = time.perf_counter() - started
    train, validation = sources.train, sources.validation
    assert isinstance(train, TextSource)
    print(f"{args.path}: rows of {args.sequence_length} positions, {args.packing}, {train.num_lanes} lanes")
    print(
        f"  train       {train.rows_per_epoch:>10,} rows an epoch, {100 * train.fill:.3f} % of positions filled, "
        f"{train.num_segments:,} segments of about {train.rows_per_epoch / train.num_segments:.1f} rows"
    )
    print(f"  one lane holds {train.segment_bytes / 2**20:.1f} MiB; a rank of N holds lanes / N of them")
    if isinstance(validation, TextSource):
        print(f"  validation  {validation.num_samples:>10,} rows, {100 * validation.fill:.3f} % of positions filled")
    if args.samples is not None:
        print(f"  {args.samples:,} samples are {args.samples / train.rows_per_epoch:.2f} epochs")
    print(f"  planned in {seconds:.2f} s")
    return 0
