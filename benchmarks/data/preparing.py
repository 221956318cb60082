"""Sub-benchmarks ``preparing`` (text to shards) and ``writing`` (tokens to shards)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import corpus
import numpy as np
from results_file import quartiles
from setting import Setting, prepare_command, run_logged

_BARE = Path(__file__).with_name("bare_encode.py")


def run_preparing(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """``pretrain data prepare text``, from process start to the finished data set, against a bare loop.

    Both have as many workers or threads as there are usable cores. The bare loop is timed without start and reading.
    """
    workers = len(os.sched_getaffinity(0))
    tokenizer = corpus.tokenizer(setting.corpus())
    sample = _sample(setting, 4 if setting.quick else 24)
    out = setting.work / "prepared"
    rates: dict[str, list[float]] = {"bare encode_batch loop": []}
    for _ in range(2 if setting.quick else 3):
        bare = subprocess.run(
            [sys.executable, str(_BARE), str(tokenizer), str(sample), str(workers)],
            check=True,
            capture_output=True,
            text=True,
        )
        loop = json.loads(bare.stdout)
        rates["bare encode_batch loop"].append(loop["tokens"] / loop["seconds"] / 1e6)
        for backend in ("hf", "auto"):
            shutil.rmtree(out, ignore_errors=True)
            command = [*prepare_command(sample, out, tokenizer, workers), "--tokenizer-backend", backend]
            started = time.perf_counter()
            run_logged(command, setting.log(f"preparing-{backend}"))
            seconds = time.perf_counter() - started
            manifest = json.loads((out / "manifest.json").read_text())
            tokens = manifest["content"]["splits"]["train"]["tokens"]
            rates.setdefault(f"prepare text, {backend}", []).append(tokens / seconds / 1e6)
    shutil.rmtree(out, ignore_errors=True)
    table = {name: quartiles(values) for name, values in rates.items()}
    reference = table["bare encode_batch loop"]["median"]
    print(f"\n{'preparing, Mtokens/s, ' + str(workers) + ' workers':<48}{'median':>9}{'quartiles':>16}{'of bare':>9}")
    for name, entry in table.items():
        spread = f"{entry['low']:>8.2f}{entry['high']:>8.2f}"
        print(f"{name:<48}{entry['median']:>9.2f}{spread}{entry['median'] / reference:>9.2f}")
    megabytes = sum(path.stat().st_size for path in sample.glob("*")) / 1e6
    return {"unit": "Mtokens/s", "workers": workers, "megabytes": megabytes, "table": table}


def _sample(setting: Setting, megabytes: int) -> Path:
    folder = setting.work / f"sample-{megabytes}"
    if not folder.exists():
        folder.mkdir()
        for path in corpus.first_files(setting.corpus(), megabytes):
            shutil.copyfile(path, folder / path.name)
    return folder


def run_writing(setting: Setting, only: set[str] | None = None) -> dict[str, Any]:
    """Blocks of tokens to synced shards: our writer, ``webdataset.TarWriter``, and the bare bytes to a plain file."""
    blocks = list(common.blocks(setting.dataset()))[: 8 if setting.quick else None]
    tokens = sum(len(block) for block, _ in blocks)
    writers: dict[str, Callable[[Path, list[Any]], None]] = {
        "plain file": _plain,
        "ours": _ours,
        "webdataset TarWriter, block members": _tar_writer,
    }
    rates: dict[str, list[float]] = {}
    folder = setting.work / "written"
    for _ in range(setting.rounds):
        for name, write in writers.items():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            started = time.perf_counter()
            write(folder, blocks)
            rates.setdefault(name, []).append(tokens / (time.perf_counter() - started) / 1e6)
    shutil.rmtree(folder, ignore_errors=True)
    table = {name: quartiles(values) for name, values in rates.items()}
    plain = table["plain file"]["median"]
    print(f"\n{'writing, Mtokens/s':<48}{'median':>9}{'quartiles':>18}{'256 MB shards/s':>17}{'of plain':>10}")
    for name, entry in table.items():
        entry["shards_256mb_per_s"] = entry["median"] * 2 / 256
        spread = f"{entry['low']:>9.1f}{entry['high']:>9.1f}"
        shards = f"{entry['shards_256mb_per_s']:>17.2f}"
        print(f"{name:<48}{entry['median']:>9.1f}{spread}{shards}{entry['median'] / plain:>10.2f}")
    return {"unit": "Mtokens/s", "tokens": tokens, "table": table}


def _plain(folder: Path, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
    with open(folder / "tokens.bin", "wb") as stream:
        for tokens, _ in blocks:
            stream.write(tokens.data)
        stream.flush()
        os.fsync(stream.fileno())


def _ours(folder: Path, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
    from data_pipeline.prepare.writer import ShardWriter, write_synced

    with open(folder / "train-000000.tar", "xb") as stream:
        writer = ShardWriter(stream, "train-000000.tar", 0)
        for tokens, offsets in blocks:
            writer.add_block(tokens, np.diff(offsets), 0)
        _, sidecar = writer.finish()
        stream.flush()
        os.fsync(stream.fileno())
    write_synced(folder / "train-000000.json", sidecar)


def _tar_writer(folder: Path, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
    import webdataset

    with open(folder / "train-000000.tar", "wb") as stream:
        with webdataset.TarWriter(stream) as writer:
            for number, (tokens, offsets) in enumerate(blocks):
                writer.write({"__key__": f"{number:012d}", "tok.npy": tokens, "off.npy": offsets})
        stream.flush()
        os.fsync(stream.fileno())
