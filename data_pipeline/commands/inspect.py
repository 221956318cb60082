"""``pretrain data inspect``: what a dataset holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

_SHARDS_SHOWN = 20
_HISTOGRAMS = (
    ("document_lengths", "document lengths"),
    ("image_pixels", "image sizes"),
    ("sample_bytes", "sample sizes"),
)
_TABLES = (
    ("extensions", "members"),
    ("image_sizes", "most frequent sizes"),
    ("latent_shapes", "latent shapes"),
    ("spans", "spans"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``inspect`` to ``parser``."""
    parser.add_argument("path", help="dataset folder or URL")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="samples to decode (default: %(default)s)")
    parser.add_argument("--plots", metavar="FOLDER", help="also write the distributions as PNG files")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the dataset; returns the exit code."""
    from data_pipeline.commands.summary import print_summary
    from data_pipeline.store.inspection import inspect_dataset, to_json
    from data_pipeline.store.manifest import Manifest

    if args.samples < 0:
        raise ValueError(f"--samples {args.samples} must be at least 0")
    manifest = Manifest.load(args.path)
    tree = inspect_dataset(manifest, num_samples=args.samples)
    if args.json:
        print(to_json(tree))
    else:
        made = tree["made"]
        print(f"{manifest.location}: {made['corpus']}, from {made['root']}")
        print_summary(manifest, skipped_shown=len(manifest.origin.get("skipped", [])))
        for line in _lines(tree):
            print(line)
    if args.plots is not None:
        from data_pipeline.store.plots import write_plots

        for path in write_plots(tree, args.plots):
            if not args.json:
                print(f"  wrote {path}")
    return 0


def _lines(tree: dict[str, Any]) -> Iterator[str]:
    from data_pipeline.store.histogram import bars

    yield "  options " + " ".join(f"{name}={value}" for name, value in tree["made"]["options"].items())
    for number, edition in enumerate(tree["editions"]):
        shards = ", ".join(f"{count} {split}" for split, count in edition["shards"].items())
        yield f"  edition {number}: {shards} shards, fingerprint {edition['fingerprint']}"
    for shard in tree["shards"][:_SHARDS_SHOWN]:
        unit = "tokens" if "tokens" in shard else "samples"
        yield f"  {shard['name']} {shard['size']:>14,} bytes {shard[unit]:>13,} {unit}"
    if len(tree["shards"]) > _SHARDS_SHOWN:
        yield f"  and {len(tree['shards']) - _SHARDS_SHOWN:,} more shards (--json lists them)"
    read = tree.get("read")
    if read is None:
        return
    unit = next(iter(read))
    yield f"looked at {read[unit]:,} of {read['of']:,} {unit} of the training split"
    for key, title in _HISTOGRAMS:
        found = tree.get(key)
        if found and found["number"]:
            yield f"{title} ({found['unit']}): mean {found['mean']:,.1f}, median {found['median']:,.0f}"
            yield from (f"  {line}" for line in bars(found))
    for key, title in _TABLES:
        if tree.get(key):
            yield f"{title}: " + ", ".join(f"{name} {count:,}" for name, count in tree[key].items())
    if tree.get("frequent_tokens"):
        yield f"most frequent tokens ({tree['unused_tokens']:,} of {tree['tokenizer']['vocab_size']:,} ids unused):"
        for token in tree["frequent_tokens"]:
            yield f"  {token['id']:>8} {100 * token['share']:6.2f} % {json.dumps(token['text'], ensure_ascii=False)}"
    if tree["samples"]:
        yield "samples:"
    for sample in tree["samples"]:
        yield "  " + " ".join(f"{name}={_shown(value)}" for name, value in sample.items())


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], str):
        return "[" + " | ".join(value) + "]"
    if (isinstance(value, str) and " " in value) or "\n" in str(value):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
