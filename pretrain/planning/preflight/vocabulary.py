"""Concern: token ids of data, tokenizer and model belong together. Torch-free.

That a model has a row for every id is a rule of the configuration. Here the tokenizer itself is opened: the manifest
may say one thing and the file another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.config.components import component_attribute
from pretrain.planning.preflight.findings import Finding, error, ok, warning
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import percent

if TYPE_CHECKING:
    from data_pipeline.store.manifest import Manifest

_LEAST_USED = 0.5
"""Share of the embedding below which its unused rows are worth a word."""


def check(subject: Subject) -> Iterator[Finding]:
    """The tokenizer of each data set against its manifest and against the model; that of given initial weights."""
    data, model = subject.config.data, subject.config.model
    rows = component_attribute(model, "vocab_size")
    if not hasattr(data, "manifests"):
        yield from _without_tokenizer(subject, rows)
        return
    try:
        manifests: dict[str, Manifest] = data.manifests()
    except (ValueError, OSError):
        return  # the concern of data tells it
    seen: dict[str, int] = {}
    for name, manifest in manifests.items():
        recorded = manifest.content.get("tokenizer")
        if recorded is None or recorded["hash"] in seen:
            continue
        what = f"tokenizer of {name}"
        try:
            ids = _num_ids(manifest.tokenizer_bytes())
        except (ValueError, OSError) as fault:
            yield error(what, str(fault), "a tokenizer.json that can be read", "restore it, or prepare the data again")
            continue
        seen[recorded["hash"]] = ids
        if ids > manifest.vocab_size:
            yield error(
                what,
                f"ids up to {ids - 1:,}",
                f"ids below {manifest.vocab_size:,}, the vocabulary in the manifest",
                "restore the tokenizer.json that the data were prepared with",
            )
        elif isinstance(rows, int):
            yield from _rows(what, ids, rows)
    yield from _largest_id(manifests, rows)
    yield from _initial_weights(subject, manifests)


def _without_tokenizer(subject: Subject, rows: object) -> Iterator[Finding]:
    ids = component_attribute(subject.config.data, "vocab_size")
    if isinstance(ids, int) and isinstance(rows, int) and ids <= rows:
        yield ok("vocabulary", f"data without tokenizer, {ids:,} ids; the model has {rows:,} rows")


def _rows(what: str, ids: int, rows: int) -> Iterator[Finding]:
    if ids > rows:
        return  # a rule of the configuration reports it
    if ids < _LEAST_USED * rows:
        yield warning(
            "model.vocab_size",
            f"{rows:,} rows, of which the {what} has ids for {ids:,} ({percent(ids, rows)})",
            "few rows beyond those that can occur: the others cost memory and are never trained",
            f"model.vocab_size={ids}, or the next multiple of what tensor parallelism and kernels like",
            rows=rows,
            ids=ids,
        )
    else:
        yield ok(what, f"{ids:,} ids, as its manifest says; the model has {rows:,} rows", ids=ids, rows=rows)


def _largest_id(manifests: dict[str, Manifest], rows: object) -> Iterator[Finding]:
    if not isinstance(rows, int):
        return
    for name, manifest in manifests.items():
        shards = [shard for split in manifest.content["splits"].values() for shard in split["shards"]]
        largest, where = max(((shard.get("largest_id", -1), shard["name"]) for shard in shards), default=(-1, ""))
        if largest >= rows:
            yield error(
                f"token ids of {name}",
                f"id {largest:,} in {where}",
                f"ids below model.vocab_size = {rows:,}",
                f"model.vocab_size={largest + 1} or more",
            )


def _initial_weights(subject: Subject, manifests: dict[str, Manifest]) -> Iterator[Finding]:
    """Imported weights know their tokens by the tokenizer that lies beside them."""
    folder = subject.config.train.init_from
    if folder is None or subject.run is not None:
        return
    path = Path(folder) / "tokenizer.json"
    first = next((m for m in manifests.values() if m.content.get("tokenizer")), None)
    if first is None or not path.is_file():
        return
    try:
        theirs, ours = _tokens(path.read_bytes()), _tokens(first.tokenizer_bytes())
    except (ValueError, OSError) as fault:
        yield warning("train.init_from", str(fault), "a tokenizer.json that can be read", f"look at {path}")
        return
    differing = sorted(ours.items() - theirs.items(), key=lambda item: item[1])
    if differing:
        token, number = differing[0]
        yield error(
            "train.init_from",
            f"{len(differing):,} tokens of the data have another id in {path}, the first {token!r} (id {number} in the"
            " data)",
            "data prepared with the tokenizer of these weights",
            f"pretrain data prepare text ... --tokenizer {path}",
        )
    else:
        yield ok("train.init_from", f"its tokenizer gives every token of the data the same id ({len(ours):,})")


def _tokens(data: bytes) -> dict[str, int]:
    """Ids by token. Raises ValueError for what is no tokenizer."""
    from tokenizers import Tokenizer

    try:
        ids: dict[str, int] = Tokenizer.from_str(data.decode()).get_vocab(with_added_tokens=True)
    except Exception as fault:  # the library raises bare Exception for a malformed file
        raise ValueError(f"tokenizer.json: no tokenizer: {fault}") from None
    return ids


def _num_ids(data: bytes) -> int:
    """Largest id + 1; from the JSON where its form is known, because the library takes seconds for large ones."""
    try:
        tree = json.loads(data)
        vocabulary = tree["model"]["vocab"]
        own = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        added = (token["id"] for token in tree.get("added_tokens", ()))
        return max([*own, *added], default=-1) + 1
    except (KeyError, TypeError, AttributeError):
        return max(_tokens(data).values(), default=-1) + 1
