"""The lines that ``prepare``, ``index`` and ``inspect`` print about a dataset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline.wording import counted

if TYPE_CHECKING:
    from data_pipeline.store.manifest import Manifest

SKIPPED_SHOWN = 5


def print_summary(manifest: Manifest, skipped_shown: int = SKIPPED_SHOWN) -> None:
    """Print counts of every split, the fingerprint, and the first ``skipped_shown`` files left out."""
    content, skipped = manifest.content, manifest.origin.get("skipped", [])
    for name, split in content["splits"].items():
        print(f"  {name:<11} {_counts(split)} {len(split['shards']):>5,} shards")
    lanes = f"{content['num_lanes']:,} lanes recommended; fingerprint {manifest.fingerprint}"
    if manifest.kind == "text":
        print(f"  vocabulary {manifest.vocab_size:,}; blocks of {content['block_tokens']:,} tokens; {lanes}")
    else:
        vocabulary = f"vocabulary {manifest.vocab_size:,}; " if content["tokenizer"] else ""
        print(f"  {manifest.kind}; {vocabulary}segments of {content['segment_bytes']:,} bytes; {lanes}")
    print(f"  {_dropped(manifest.origin)}" + (":" if skipped else ""))
    for item in skipped[:skipped_shown]:
        print(f"    {item['path']}: {item['why']}")
    if len(skipped) > skipped_shown:
        print(f"    and {len(skipped) - skipped_shown:,} more examples (pretrain data inspect {manifest.location})")


def _dropped(origin: dict[str, Any]) -> str:
    if "dropped" not in origin:
        return f"{counted(len(origin.get('skipped', [])), 'file')} skipped"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(origin["dropped"].items()))
    return f"{counted(sum(origin['dropped'].values()), 'document')} dropped" + (f" ({reasons})" if reasons else "")


def _counts(split: dict[str, int]) -> str:
    if "samples" in split:
        return f"{split['samples']:>9,} samples {split['bytes']:>14,} bytes"
    return (
        f"{split['documents']:>9,} documents {split['tokens']:>13,} tokens "
        f"{split['bytes']:>14,} bytes {split['blocks']:>7,} blocks"
    )
