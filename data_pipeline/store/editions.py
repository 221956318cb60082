"""Appending shards: every earlier state of a dataset stays part of its manifest, exactly.

``content["editions"]`` lists the earlier states, oldest first: their fingerprint and how many shards each split
had. Shards are only ever added at the end of a split, so an earlier content is a prefix of the present one,
and its digest proves it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.store.manifest import Manifest


def appended(manifest: Manifest, new_train_shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of ``manifest`` with ``new_train_shards`` (shard entries) at the end of its training split.

    The present state becomes its last edition. Raises ValueError, with all faults, when a new shard has the
    name of one that is there, lacks a count that the split sums, or holds ids outside the vocabulary.
    """
    content = copy.deepcopy(manifest.content)
    train = content["splits"]["train"]
    faults = _append_faults(manifest, train, new_train_shards)
    if faults:
        raise ValueError(
            f"{manifest.location}: shards cannot be appended: "
            + "; ".join(faults)
            + ". What to do: prepare them anew for this dataset."
        )
    editions = content.setdefault("editions", [])
    editions.append(
        {
            "fingerprint": manifest.fingerprint,
            "shards": {name: len(split["shards"]) for name, split in content["splits"].items()},
        }
    )
    train["shards"].extend(copy.deepcopy(list(new_train_shards)))
    for count in _counts(train):
        train[count] += sum(shard[count] for shard in new_train_shards)
    return content


def earlier_content(content: dict[str, Any], fingerprint: str) -> dict[str, Any] | None:
    """The content that had ``fingerprint``, rebuilt from ``content``; None when no edition has it."""
    editions = content.get("editions", [])
    at = next((n for n, edition in enumerate(editions) if edition["fingerprint"] == fingerprint), None)
    if at is None:
        return None
    earlier = copy.deepcopy(content)
    for name, split in earlier["splits"].items():
        kept = editions[at]["shards"].get(name, 0)
        # Subtracted, not summed: shards of the first datasets do not record their bytes.
        for count in _counts(split):
            split[count] -= sum(shard[count] for shard in split["shards"][kept:])
        del split["shards"][kept:]
    earlier["editions"] = editions[:at]
    if not earlier["editions"]:
        del earlier["editions"]
    return earlier


def first_difference(shards_then: Sequence[dict[str, str]], shards_now: Sequence[dict[str, str]]) -> str | None:
    """The first shard in which two shard tables (``name``, ``sidecar_hash``) differ, and how; None when equal."""
    then_at = {shard["name"]: at for at, shard in enumerate(shards_then)}
    now_at = {shard["name"]: at for at, shard in enumerate(shards_now)}
    now_by_hash = {shard["sidecar_hash"]: shard["name"] for shard in shards_now}
    for at, (then, now) in enumerate(zip(shards_then, shards_now, strict=False)):
        name = then["name"]
        if name == now["name"]:
            if then["sidecar_hash"] != now["sidecar_hash"]:
                return f"shard {name} (number {at}) has changed: its contents are others now"
        elif name in now_at and now["name"] in then_at:
            return f"shards are reordered: number {at} was {name}, now it is {now['name']}"
        elif name in now_at:
            return f"shard {now['name']} (number {at}) is added before {name}"
        elif then["sidecar_hash"] in now_by_hash:
            return f"shard {name} (number {at}) is renamed to {now_by_hash[then['sidecar_hash']]}"
        elif now["name"] in then_at:
            return f"shard {name} (number {at}) is missing"
        else:
            return f"shard {name} (number {at}) is missing; {now['name']} stands in its place (renamed or replaced)"
    if len(shards_then) > len(shards_now):
        return f"shard {shards_then[len(shards_now)]['name']} (number {len(shards_now)}) is missing"
    if len(shards_now) > len(shards_then):
        return f"shard {shards_now[len(shards_then)]['name']} (number {len(shards_then)}) is added"
    return None


def _counts(split: dict[str, Any]) -> list[str]:
    return [name for name, value in split.items() if name != "shards" and isinstance(value, int)]


def _append_faults(manifest: Manifest, train: dict[str, Any], new_train_shards: Sequence[dict[str, Any]]) -> list[str]:
    faults = [] if new_train_shards else ["there are no new shards"]
    taken = {shard["name"] for split in manifest.content["splits"].values() for shard in split["shards"]}
    for shard in new_train_shards:
        if shard["name"] in taken:
            faults.append(f"{shard['name']} is there already")
        taken.add(shard["name"])
        absent = [name for name in (*_counts(train), "size", "sidecar_hash") if name not in shard]
        if absent:
            faults.append(f"the entry of {shard['name']} has no {', '.join(absent)}")
        if "largest_id" in shard and shard["largest_id"] >= manifest.vocab_size:
            faults.append(
                f"{shard['name']} holds token id {shard['largest_id']}, outside the vocabulary of {manifest.vocab_size}"
            )
    return faults
