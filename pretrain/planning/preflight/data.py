"""Concern: the data sets are there, whole as far as sizes tell, and the ones that the run began with. Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.run_dir import RunDirectoryError
from pretrain.planning.preflight.findings import Finding, error, ok, unknown, warning
from pretrain.planning.preflight.subject import Subject
from pretrain.planning.preflight.units import amount, percent, size

if TYPE_CHECKING:
    from data_pipeline.store.manifest import Manifest

_SHOWN = 3
_PATIENCE_S = 10.0


def check(subject: Subject) -> Iterator[Finding]:
    """Presence of every data set, its identity when a run is continued, how often its tokens come round."""
    data = subject.config.data
    if not hasattr(data, "manifests"):
        yield ok("data", "made up on the spot or of another kind: there are no shards to look at")
        return
    try:
        manifests: dict[str, Manifest] = data.manifests()
    except (ValueError, OSError) as fault:
        if not any(violation.path.startswith("data") for violation in subject.violations):
            yield error(
                "data", str(fault), "a prepared data set, in the edition asked for", "correct data.path, or prepare it"
            )
            with contextlib.suppress(ValueError, OSError):  # where the data are others, the first shard that differs
                yield from _identity(subject)
        return
    substitutes = getattr(data, "on_damage", "stop") == "substitute"
    for name, manifest in manifests.items():
        yield from _presence(name, manifest, substitutes)
    yield from _identity(subject)
    yield from _epochs(subject, manifests)
    yield from _cache(subject, manifests)


def _presence(name: str, manifest: Manifest, substitutes: bool) -> Iterator[Finding]:
    from data_pipeline.store.presence import look

    found = look(_patient_for_seconds(manifest))
    what = f"{name}: {manifest.location}"
    if found.faults:
        report = warning if substitutes else error
        yield report(
            what,
            _listed(found.faults),
            "every shard and sidecar of the manifest, with its size and hash",
            "restore these files, or prepare the data set again"
            + ("; as it is, data.on_damage=substitute puts other rows in their place" if substitutes else "")
            + f"; `pretrain data verify {manifest.location}` reads every byte",
            damaged=len(found.faults),
        )
    if found.unreached:
        yield warning(
            what,
            _listed(found.unreached),
            "an answer from the storage",
            "try again; look at the network of this host, data.fetch and the credentials",
        )
    if not found.faults and not found.unreached:
        sized = "all" if found.sized == found.shards else f"{found.sized:,} of"
        yield ok(
            what,
            f"manifest {manifest.fingerprint[:12]} intact; {sized} {found.shards:,} shards ({size(found.bytes)}) there,"
            f" of the right size; {found.sidecars:,} sidecars match their hash",
            shards=found.shards,
            bytes=found.bytes,
            sized=found.sized,
        )


def _patient_for_seconds(manifest: Manifest) -> Manifest:
    """The manifest on a storage that gives up sooner than training would."""
    if manifest.is_local:
        return manifest
    from data_pipeline.fetch.storage import open_storage

    settings = getattr(manifest.storage, "settings", None)
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return manifest
    short: Any = dataclasses.replace(settings, deadline_s=_PATIENCE_S)
    return dataclasses.replace(manifest, storage=open_storage(manifest.location, short))


def _identity(subject: Subject) -> Iterator[Finding]:
    run = subject.run
    if run is None or not (run.path / "datasets.json").is_file():
        return
    try:
        run.check_datasets(subject.config.data.datasets())
    except RunDirectoryError as fault:
        text = str(fault)
        yield error(str(run.path / "datasets.json"), text, "the data that the run began with", "see there")
    except OSError as fault:
        yield unknown(str(run.path / "datasets.json"), f"could not be compared: {fault}")
    else:
        yield ok(str(run.path / "datasets.json"), "the data are those that the run began with")


def _epochs(subject: Subject, manifests: dict[str, Manifest]) -> Iterator[Finding]:
    """Tokens of the run against tokens of the data; a mixture goes round its sources at their own pace."""
    length = subject.sequence_length
    if length is None or any(manifest.kind != "text" for manifest in manifests.values()):
        return
    available = sum(int(manifest.split("train")["tokens"]) for manifest in manifests.values())
    train = subject.config.train
    tokens = train.steps * train.global_batch_size * length
    epochs = tokens / max(available, 1)
    together = "" if len(manifests) == 1 else " of all sources together"
    yield ok(
        "tokens",
        f"{train.steps:,} steps x {train.global_batch_size:,} x {length:,} = {amount(tokens)} tokens,"
        f" {epochs:.2f} times the {amount(available)}{together}",
        tokens=tokens,
        epochs=epochs,
    )


def _cache(subject: Subject, manifests: dict[str, Manifest]) -> Iterator[Finding]:
    """Room of the cache of remote data, which is on the nodes: here only the local launcher can know."""
    if all(manifest.is_local for manifest in manifests.values()):
        return
    fetch = subject.config.data.fetch
    if subject.slurm is not None:
        where = fetch.cache_folder or "the nodes' temporary folder"
        yield unknown("data.fetch.cache_folder", f"room for {fetch.cache_gib:g} GiB in {where} shows on the nodes only")
        return
    place = _existing(Path(fetch.cache().path()))
    free = shutil.disk_usage(place).free
    wanted = fetch.cache_gib * 2**30
    if free < wanted:
        yield warning(
            "data.fetch.cache_gib",
            f"{size(free)} free in {place}, {percent(free, wanted)} of the cache's {fetch.cache_gib:g} GiB",
            "room for the cache; it uses what there is, and fetches more often",
            f"data.fetch.cache_gib={max(free // 2**30 - 1, 1)}, or data.fetch.cache_folder on a larger disk",
        )
    else:
        yield ok("data.fetch.cache_gib", f"{size(free)} free in {place} for {fetch.cache_gib:g} GiB")


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _listed(texts: Sequence[str]) -> str:
    shown = [text.partition(" What to do:")[0] for text in texts[:_SHOWN]]
    more = [f"... and {len(texts) - _SHOWN} more"] if len(texts) > _SHOWN else []
    return "\n".join([*shown, *more])
