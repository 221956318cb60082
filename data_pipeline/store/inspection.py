"""What a dataset holds, as one JSON-ready tree: counts, distributions, decoded samples, what was left out.

Large datasets are looked at through blocks and shards spread evenly over the training split; the tree says how
many were read.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from data_pipeline.store.histogram import histogram
from data_pipeline.store.manifest import FORMAT, Manifest, Sample
from data_pipeline.store.reader import BlockReader
from data_pipeline.store.samples import read_sample

Item = TypeVar("Item")

_SHARDS_READ, _BLOCKS_READ = 64, 256
_TOKENS_SHOWN, _SIZES_SHOWN = 20, 10
_TEXT_SHOWN = 240


def inspect_dataset(
    location: str | os.PathLike[str] | Manifest, *, num_samples: int = 3, split: str = "train"
) -> dict[str, Any]:
    """The tree for the dataset in a folder or below a URL; ``num_samples`` are decoded.

    Raises ValueError when there is no dataset, DamagedDataError when what is read is damaged, FetchError.
    """
    manifest = location if isinstance(location, Manifest) else Manifest.load(location)
    tree = _describe(manifest)
    shards = _spread(manifest.split(split)["shards"], _SHARDS_READ)
    look = _look_at_text if manifest.format == FORMAT else _look_at_samples
    return tree | look(manifest, shards, num_samples) if shards else tree


def dropped_by_reason(origin: dict[str, Any]) -> dict[str, int]:
    """How many inputs were left out when the dataset was made, by reason."""
    if "dropped" in origin:
        return dict(Counter(origin["dropped"]).most_common())
    return dict(Counter(item["why"].partition(":")[0] for item in origin.get("skipped", [])).most_common())


def _describe(manifest: Manifest) -> dict[str, Any]:
    content, origin = manifest.content, manifest.origin
    tree: dict[str, Any] = {
        "location": manifest.location,
        "kind": manifest.kind,
        "fingerprint": manifest.fingerprint,
        "splits": {
            name: {key: value for key, value in split.items() if key != "shards"} | {"shards": len(split["shards"])}
            for name, split in content["splits"].items()
        },
        "shards": [
            {key: value for key, value in shard.items() if key != "sidecar_hash"}
            for split in content["splits"].values()
            for shard in split["shards"]
        ],
        "editions": content.get("editions", []),
        "made": {"corpus": origin.get("corpus"), "root": origin.get("root"), "options": origin.get("options", {})},
        "dropped": dropped_by_reason(origin),
    }
    skipped = ("splits", "editions", "kind")
    return tree | {key: value for key, value in content.items() if key not in skipped}


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most ``count`` of ``items``, evenly spaced, the first among them."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def _look_at_text(manifest: Manifest, shards: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(manifest.tokenizer_bytes().decode())
    blocks = _spread([block for shard in shards for block in manifest.shard_blocks(shard)], _BLOCKS_READ)
    reader = BlockReader(manifest, blocks)
    shown = set(_spread(range(len(blocks)), num_samples))
    lengths = []
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    samples = []
    for index, block in enumerate(blocks):
        arrays = reader.read(index)
        lengths.append(np.diff(arrays.offsets))
        counts += np.bincount(arrays.tokens, minlength=manifest.vocab_size)
        if index in shown:
            document = arrays.tokens[: int(arrays.offsets[1])]
            framed = document[1:-1].tolist()
            text = tokenizer.decode(framed[:_TEXT_SHOWN], skip_special_tokens=False)
            samples.append(
                {
                    "shard": block.shard,
                    "member": f"{block.key}.tok.npy",
                    "document": 0,
                    "tokens": len(document),
                    "text": _shortened(text, len(framed) > _TEXT_SHOWN),
                }
            )
    total = int(counts.sum())
    head = np.argsort(-counts, kind="stable")[:_TOKENS_SHOWN]
    return {
        "read": {"blocks": len(blocks), "of": sum(s["blocks"] for s in manifest.split("train")["shards"])},
        "document_lengths": histogram(np.concatenate(lengths), "tokens"),
        "token_counts": np.sort(counts[counts > 0])[::-1].tolist(),
        "unused_tokens": int((counts == 0).sum()),
        "frequent_tokens": [
            {"id": int(i), "text": tokenizer.decode([int(i)], skip_special_tokens=False), "share": counts[i] / total}
            for i in head
            if counts[i]
        ],
        "samples": samples[:num_samples],
    }


def _look_at_samples(manifest: Manifest, shards: list[dict[str, Any]], num_samples: int) -> dict[str, Any]:
    samples = [sample for shard in shards for sample in manifest.shard_samples(shard)]
    sizes = [sum(entry["length"] for entry in sample.members.values()) for sample in samples]
    extensions = Counter(_kind_of(extension) for sample in samples for extension in sample.members)
    tree: dict[str, Any] = {
        "read": {"samples": len(samples), "of": sum(s["samples"] for s in manifest.split("train")["shards"])},
        "extensions": dict(extensions.most_common()),
        "sample_bytes": histogram(np.array(sizes), "bytes"),
        "samples": [_decode(manifest, sample) for sample in _spread(samples, num_samples)],
    }
    attributes = [sample.attributes for sample in samples]
    known = [a for a in attributes if "width" in a]
    if known:
        tree["widths"] = histogram(np.array([a["width"] for a in known]), "pixels")
        tree["heights"] = histogram(np.array([a["height"] for a in known]), "pixels")
        tree["image_sizes"] = _most_common(f"{a['width']}x{a['height']}" for a in known)
        tree["image_pixels"] = histogram(np.array([a["width"] * a["height"] for a in known]), "pixels")
    shapes = ["x".join(map(str, a["shape"])) for a in attributes if "shape" in a]
    if shapes:
        tree["latent_shapes"] = _most_common(shapes)
    spans = [a["spans"] for a in attributes if "spans" in a]
    if spans:
        text = [sum(int(span[1]) for span in document if span[0] == "text") for document in spans]
        tree["document_lengths"] = histogram(np.array(text), "tokens of text")
        tree["spans"] = _most_common(span[0] for document in spans for span in document)
    return tree


def _decode(manifest: Manifest, sample: Sample) -> dict[str, Any]:
    """What a person wants to see of a sample."""
    members = read_sample(manifest, sample)
    shown: dict[str, Any] = {"shard": sample.shard, "key": sample.key}
    shown["members"] = {extension: len(payload) for extension, payload in members.items()}
    shown |= {name: value for name, value in sample.attributes.items() if name != "spans"}
    if "spans" in sample.attributes:
        shown["spans"] = [_span_text(span) for span in sample.attributes["spans"]]
    for extension in ("txt", "caption", "text", "json"):
        if extension in members:
            text = bytes(members[extension]).decode("utf-8", "replace")
            shown[extension] = _shortened(text, False)
    if "tok.npy" in members and manifest.content.get("tokenizer") is not None:
        from tokenizers import Tokenizer

        from data_pipeline.media.captions import parse_tokens

        tokenizer = Tokenizer.from_str(manifest.tokenizer_bytes().decode())
        ids = parse_tokens(members["tok.npy"], manifest.vocab_size).tolist()
        shown["tokens"] = len(ids)
        text = tokenizer.decode(ids[:_TEXT_SHOWN], skip_special_tokens=True)
        shown["text"] = _shortened(text, len(ids) > _TEXT_SHOWN)
    return shown


def _span_text(span: list[Any]) -> str:
    if span[0] == "image":
        return f"image {span[2]}x{span[1]}"
    if span[0] == "speech":
        return f"speech {span[1] / span[2]:.2f} s at {span[2]} Hz"
    return f"{span[0]} {span[1]} tokens"


def _kind_of(extension: str) -> str:
    head, _, rest = extension.partition(".")
    return f"N.{rest}" if head.isdigit() and rest else extension


def _most_common(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common(_SIZES_SHOWN))


def _shortened(text: str, cut: bool) -> str:
    return text[:_TEXT_SHOWN] + (" ..." if cut or len(text) > _TEXT_SHOWN else "")


def to_json(tree: dict[str, Any]) -> str:
    """The tree as JSON, without the long list of token counts."""
    return json.dumps(
        {key: value for key, value in tree.items() if key != "token_counts"}, indent=1, ensure_ascii=False
    )
