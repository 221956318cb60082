"""The stages of a preparation, one unit of work at a time, and how to see which units are done.

``survey`` and ``tokenise`` have one unit for each piece of the input, ``write`` one for each bucket. A unit is
done when its marker is there and the files it names are. Units do not depend on who does them, nor on the
order; doing one twice gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.prepare import keys, survey
from data_pipeline.prepare.encoding import Backend, Encoded, HuggingFace, first_difference, frame, make_backend
from data_pipeline.prepare.metering import Counts, Drops, Meter
from data_pipeline.prepare.plan import PLAN_NAME, Plan
from data_pipeline.prepare.records import Dropped, Record
from data_pipeline.prepare.request import REQUEST_NAME, Request
from data_pipeline.prepare.sample import cut_text
from data_pipeline.prepare.spill import ROWS, SpillBuffer, gather, read_bucket
from data_pipeline.prepare.streams import network_errors
from data_pipeline.prepare.workspace import WorkFolder
from data_pipeline.prepare.writer import KEY_PREFIXES, ShardWriter, block_ends
from data_pipeline.store.manifest import digest_of

SURVEY, TOKENISE, WRITE = "survey", "tokenise", "write"
_FOLDER = {SURVEY: "survey", TOKENISE: "spill", WRITE: "shards"}
HELD_OUT_NAME = "held_out.u8"
"""In an append: sorted hashes of the tokens of every held-out document, which must not be trained on."""

_RUN_BYTES = 1 << 29
_RECHECKED_SHARE, _RECHECKED_BYTES = 4096, 256


def purpose(stage: str, unit: int, request: Request, plan: Plan | None) -> str:
    """Digest of everything that decides what a unit leaves: a marker of another one is void."""
    if stage == SURVEY:
        options = request.options
        deciding = [options.seed, options.text_field, request.given is None, survey.exact_split(request)]
        return digest_of([request.piece_identity(unit), *deciding, survey.sample_floor(request)])
    assert plan is not None
    if stage == TOKENISE:
        return digest_of([request.piece_identity(unit), plan.spill_digest])
    return digest_of([request.digest, plan.spill_digest, plan.block_tokens, plan.first_shard])


def find_done(work: WorkFolder, stage: str, num_units: int, request: Request, plan: Plan | None = None) -> set[int]:
    """Units of ``stage`` that are done: their markers are valid and the files they name are there."""
    present = {int(path.stem) for path in (work.path / _FOLDER[stage]).glob("*.json")}
    done = set()
    for unit in present:
        if unit < num_units:
            marker = read_marker(work, stage, unit)
            if marker["of"] == purpose(stage, unit, request, plan) and _whole(work, marker["files"]):
                done.add(unit)
    return done


def _whole(work: WorkFolder, files: list[dict[str, Any]]) -> bool:
    try:
        return all((work.path / file["name"]).stat().st_size == file["size"] for file in files)
    except FileNotFoundError:
        return False


def read_marker(work: WorkFolder, stage: str, unit: int) -> Any:
    """What a done unit left about itself."""
    return work.read_json(f"{_FOLDER[stage]}/{unit:06d}.json")


class Stages:
    """Does units of the preparation in the work folder at ``path``; made anew in each process."""

    def __init__(self, path: Path, writer: str) -> None:
        self._work = WorkFolder(path, writer)

    def __call__(self, stage: str, unit: int, meter: Meter) -> None:
        """Do one unit. Raises ValueError for input that cannot be used, OSError when disk or network fail."""
        do = {SURVEY: self._survey, TOKENISE: self._tokenise, WRITE: self._write}[stage]
        do(unit, meter)

    @cached_property
    def _request(self) -> Request:
        return Request.from_json(self._work.read_json(REQUEST_NAME))

    @cached_property
    def _plan(self) -> Plan:
        return Plan.from_json(self._work.read_json(PLAN_NAME)["plan"])

    @cached_property
    def _backend(self) -> Backend:
        return make_backend(self._plan.backend, self._plan.tokenizer)

    @cached_property
    def _reference(self) -> Backend:
        return HuggingFace(self._plan.tokenizer)

    @cached_property
    def _held_out(self) -> np.ndarray:
        path = self._work.path / HELD_OUT_NAME
        return np.fromfile(path, dtype="<u8") if path.exists() else np.empty(0, np.uint64)

    def _survey(self, piece: int, meter: Meter) -> None:
        with network_errors(self._request.piece_files(piece)):
            found = survey.survey_piece(self._request, self._work, piece, meter)
        self._mark(SURVEY, piece, [], found)

    def _tokenise(self, piece: int, meter: Meter) -> None:
        """Write the spills of one piece: ``spill/P-R.bin`` for each run R, then the marker ``spill/P.json``."""
        drops, counts = Drops(), Counts()
        runs: list[dict[str, Any]] = []
        buffer = SpillBuffer(self._plan.dtype)
        with network_errors(self._request.piece_files(piece)):
            for number, batch in enumerate(survey.batches(self._request, piece, meter, drops)):
                if number == 0 and self._plan.backend != "hf":
                    self._recheck(piece, batch)
                done = self._encode(batch, buffer, drops)
                counts.add(done)
                meter.add(done)
                if buffer.size >= _RUN_BYTES:
                    runs.append(self._spill(piece, len(runs), buffer))
                    buffer = SpillBuffer(self._plan.dtype)
        if buffer.size:
            runs.append(self._spill(piece, len(runs), buffer))
        found = {"documents": counts.documents, "bytes": counts.bytes, "tokens": counts.tokens}
        self._mark(TOKENISE, piece, runs, {**found, "dropped": drops.to_json()})

    def _encode(self, batch: list[Record], buffer: SpillBuffer, drops: Drops) -> Counts:
        ids, lengths = self._backend([record.raw for record in batch])
        keep, reasons = self._judge(ids, lengths)
        before = drops.counts.copy()
        for index in np.flatnonzero(~keep).tolist():
            drops.add(Dropped(self._request.corpus.display(batch[index].file), reasons[index]))
        if not keep.all():
            ids = ids[np.repeat(keep, lengths)]
            lengths = lengths[keep]
            batch = [record for record, kept in zip(batch, keep.tolist(), strict=True) if kept]
        encoded = frame(ids, lengths, self._plan.tokenizer, self._plan.dtype)
        if batch:
            self._add(batch, encoded, buffer)
        size = sum(len(record.raw) for record in batch)
        return Counts(0, len(batch), size, len(encoded.tokens), 0, drops.counts - before)

    def _judge(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Which documents stay, and why the others do not."""
        reasons = dict.fromkeys(np.flatnonzero(lengths == 0).tolist(), "no tokens")
        if len(self._held_out):
            hashes = token_hashes(ids, lengths)
            at = np.minimum(np.searchsorted(self._held_out, hashes), len(self._held_out) - 1)
            equal = np.flatnonzero(self._held_out[at] == hashes).tolist()
            reasons.update(dict.fromkeys(equal, "equal to a held-out document"))
        keep = np.ones(len(lengths), dtype=bool)
        keep[list(reasons)] = False
        return keep, reasons

    def _recheck(self, piece: int, batch: list[Record]) -> None:
        """Compare a fast back end with the reference on a little of every piece, not only on the sample."""
        budget = max(self._request.piece_size(piece) // _RECHECKED_SHARE, _RECHECKED_BYTES)
        texts: list[bytes] = []
        for record in batch:
            texts.append(cut_text(record.raw, budget))
            budget -= len(texts[-1])
            if budget <= 0:
                break
        difference = first_difference(self._backend, self._reference, texts)
        if difference is not None:
            record = batch[difference]
            raise ValueError(
                f"{self._request.corpus.display(record.file)}: at {record.place} the {self._plan.backend} tokeniser "
                "differs from the tokenizers library, though it passed the check before. What to do: run again "
                "with --tokenizer-backend hf --force."
            )

    def _add(self, batch: list[Record], encoded: Encoded, buffer: SpillBuffer) -> None:
        options, plan = self._request.options, self._plan
        rows = np.empty(len(batch), dtype=ROWS)
        rows["digest"] = digests = keys.content_digests([record.raw for record in batch])
        rows["tokens"], rows["bytes"] = encoded.lengths, [len(record.raw) for record in batch]
        if options.deduplicate:
            rows["key"] = keys.content_keys(digests, options.seed, "order")
        else:  # by place: equal documents must not become neighbours
            rows["key"] = self._order_by_place(batch)
        train = keys.buckets(rows["key"], plan.buckets["train"])
        where = train
        if plan.buckets["validation"]:
            held = plan.held_out.holds(keys.content_keys(digests, options.seed, "split"), rows["bytes"])
            validation = keys.buckets(rows["key"], plan.buckets["validation"]) + plan.buckets["train"]
            where = np.where(held, validation, train)
        buffer.add(rows, where, encoded)

    def _order_by_place(self, batch: list[Record]) -> np.ndarray:
        files = np.array([record.file for record in batch])
        places = np.array([record.place for record in batch], dtype=np.int64)
        cuts = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(batch)]
        parts = []
        for start, stop in pairwise(cuts):
            file = self._request.corpus.files[batch[start].file]
            seed = self._request.options.seed
            parts.append(keys.place_keys(places[start:stop], seed, "order", file.source, file.name))
        return np.concatenate(parts)

    def _spill(self, piece: int, run: int, buffer: SpillBuffer) -> dict[str, Any]:
        name = f"spill/{piece:06d}-{run:03d}.bin"
        with self._work.create(name) as stream:
            size = buffer.write(stream, self._plan.num_buckets)
        return {"name": name, "size": size}

    @cached_property
    def _spills(self) -> list[Path]:
        markers = (read_marker(self._work, TOKENISE, piece) for piece in range(len(self._request.pieces)))
        return [self._work.path / run["name"] for marker in markers for run in marker["files"]]

    def _write(self, bucket: int, meter: Meter) -> None:
        """Write the shard of one bucket and its sidecar, then the marker ``shards/B.json``."""
        parts = []
        for path in self._spills:
            part = read_bucket(path, bucket, self._plan.dtype)
            if len(part.rows):
                parts.append(part)
        if not parts:
            self._mark(WRITE, bucket, [], {"entry": None, "duplicates": 0})
            return
        rows, tokens, duplicates = gather(parts, self._request.options.deduplicate)
        split, number = self._plan.locate(bucket)
        name = f"{split}-{number:06d}"
        with self._work.create(f"dataset/{name}.tar") as stream:
            writer = ShardWriter(stream, f"{name}.tar", number, KEY_PREFIXES[split])
            start = 0
            for end in block_ends(rows["tokens"], self._plan.block_tokens):
                block = np.concatenate(tokens[start:end])
                writer.add_block(block, rows["tokens"][start:end], int(rows["bytes"][start:end].sum()))
                meter.add(Counts(written=len(block)))
                start = end
            entry, sidecar = writer.finish()
        self._work.write(f"dataset/{name}.json", sidecar)
        files = [
            {"name": f"dataset/{name}.tar", "size": entry["size"]},
            {"name": f"dataset/{name}.json", "size": len(sidecar)},
        ]
        self._mark(WRITE, bucket, files, {"entry": entry, "duplicates": duplicates})

    def _mark(self, stage: str, unit: int, files: list[dict[str, Any]], found: dict[str, Any]) -> None:
        plan = None if stage == SURVEY else self._plan
        of = purpose(stage, unit, self._request, plan)
        self._work.write_json(f"{_FOLDER[stage]}/{unit:06d}.json", {"of": of, "files": files, **found})


def token_hashes(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """xxh3-64 (uint64) of the ids of each document, without its frame."""
    wide = np.ascontiguousarray(ids, dtype="<u4")
    ends = np.cumsum(lengths).tolist()
    return np.array([xxhash.xxh3_64_intdigest(wide[s:e].data) for s, e in _pairs(ends)], dtype=np.uint64)


def _pairs(ends: list[int]) -> Iterator[tuple[int, int]]:
    return zip([0, *ends[:-1]], ends, strict=True)
