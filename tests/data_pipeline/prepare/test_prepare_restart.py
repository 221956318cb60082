"""Preparing that is stopped, divided and taken up again gives the same bytes as preparing in one go."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from prepare_helpers import contents, random_texts, write_jsonl
from text_corpus import SMALL

import data_pipeline.prepare.plan as plan_module
import data_pipeline.prepare.stages as stages_module
import data_pipeline.prepare.text as text_module
import data_pipeline.prepare.workspace as workspace_module
from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare.metering import Status
from data_pipeline.prepare.sample import Sample
from data_pipeline.prepare.text import PrepareReport, UnfinishedTasksError, prepare_text
from data_pipeline.prepare.workspace import Task
from data_pipeline.store.manifest import Manifest

ROOT = Path(__file__).parents[3]
PIECE = 4_000
NUM_DOCUMENTS = 300


@pytest.fixture(autouse=True)
def _processes_for_small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_WORTH_READING", 0)
    monkeypatch.setattr(text_module, "_WORTH_WRITING", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three JSONL files of 300 documents and three bad lines; many pieces of ``PIECE`` bytes; read only."""
    folder = tmp_path_factory.mktemp("jsonl")
    texts = random_texts(NUM_DOCUMENTS)
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", texts[number::3])
        with open(folder / f"{number}.jsonl", "ab") as stream:
            stream.write(b'{"text": "cut sh\n')
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one undisturbed process writes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    manifest = prepare(source, out).manifest
    assert len(manifest.split("train")["shards"]) > 3
    assert manifest.splits == ("train", "validation")
    assert manifest.origin["dropped"] == {"not JSON": 3}
    return contents(out)


def prepare(source: Path, out: Path, **arguments: Any) -> PrepareReport:
    return prepare_text(source, out, **{"options": SMALL, "workers": 1, "piece_bytes": PIECE, **arguments})


def test_shards_do_not_depend_on_workers(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    prepare(source, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("piece_bytes", [700, 1 << 20])
def test_shards_do_not_depend_on_pieces_or_runs(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(stages_module, "_RUN_BYTES", 3_000)  # several spills of the large piece
    prepare(source, tmp_path / "out", piece_bytes=piece_bytes)
    found = contents(tmp_path / "out")
    # Where a bad line is told by its byte instead of its number depends on the pieces.
    assert json.loads(found.pop("manifest.json"))["content"] == json.loads(expected["manifest.json"])["content"]
    assert found == {name: data for name, data in expected.items() if name != "manifest.json"}


KILLING = """
import os, signal, sys
from data_pipeline.prepare.text import PrepareOptions, prepare_text
wanted, count, before = {wanted!r}, {count}, {before}
replace = os.replace
def killing(source, target):
    global count
    count -= wanted in str(target)
    if before and not count:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = killing
prepare_text({source!r}, {out!r}, options={options!r}, workers=1, piece_bytes={piece})
"""


@pytest.mark.parametrize(
    ("wanted", "count", "before"),
    [
        ("/survey/", 7, False),
        ("/plan.json", 1, False),
        ("/spill/", 9, True),
        ("/spill/", 10, False),
        ("/shards/", 2, False),
        ("/dataset/train-000003.json", 1, True),
        ("/dataset/manifest.json", 1, False),
    ],
)
def test_killed_command_goes_on_where_it_was(
    source: Path, expected: dict[str, bytes], tmp_path: Path, wanted: str, count: int, before: bool
) -> None:
    out = tmp_path / "out"
    script = KILLING.format(
        wanted=wanted, count=count, before=before, source=str(source), out=str(out), options=SMALL, piece=PIECE
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    done = {path.name for path in (tmp_path / ".out.preparing" / "spill").glob("*.json")}
    report = prepare(source, out)
    if "/spill/" in wanted:
        assert done
        assert 0 < report.counts.documents < NUM_DOCUMENTS
    if "/shards/" in wanted or "/dataset/" in wanted:
        assert report.counts.documents == 0
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLING_WITH_WORKERS = """
import multiprocessing, os, signal
from data_pipeline.prepare import pool, text
from data_pipeline.prepare.text import PrepareOptions, prepare_text
text._WORTH_READING = text._WORTH_WRITING = 0
run = pool.Workers.run
def killing(self, stage, *arguments):
    for number, unit in enumerate(run(self, stage, *arguments)):
        if stage == {stage!r} and number == 2:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        yield unit
pool.Workers.run = killing
if __name__ == "__main__":
    prepare_text({source!r}, {out!r}, options={options!r}, workers=2, piece_bytes={piece})
"""


@pytest.mark.parametrize("stage", ["tokenise", "write"])
def test_killed_command_takes_its_workers_along(
    source: Path, expected: dict[str, bytes], tmp_path: Path, stage: str
) -> None:
    out = tmp_path / "out"
    script = KILLING_WITH_WORKERS.format(stage=stage, source=str(source), out=str(out), options=SMALL, piece=PIECE)
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, stdout=subprocess.PIPE)
    assert killed.returncode == -signal.SIGKILL
    children = list(map(int, killed.stdout.split()))
    assert len(children) == 2
    deadline = time.monotonic() + 60
    while any(map(is_running, children)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not out.exists()
    report = prepare(source, out, workers=2)
    assert report.counts.documents < NUM_DOCUMENTS
    assert contents(out) == expected


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_killed_worker_is_an_error_and_its_work_is_done_again(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    others = set(multiprocessing.active_children())  # of other tests

    def kill_one(status: Status) -> None:
        if status.phase == "tokenising" and status.counts.documents:
            for child in set(multiprocessing.active_children()) - others:
                os.kill(child.pid or 0, signal.SIGKILL)

    with pytest.raises(ChildProcessError, match=r"was killed by SIGKILL at unit .* fewer --workers"):
        prepare(source, tmp_path / "out", workers=2, progress=kill_one)
    assert not (tmp_path / "out").exists()
    report = prepare(source, tmp_path / "out", workers=2)
    assert contents(tmp_path / "out") == expected
    assert report.counts.documents <= NUM_DOCUMENTS


def run_tasks(source: Path, out: Path, count: int) -> list[list[int] | None]:
    """Each task once: the tasks it says are missing, None when it has nothing left."""
    outcomes: list[list[int] | None] = []
    for index in range(count):
        try:
            prepare(source, out, task=Task(index, count))
            outcomes.append(None)
        except UnfinishedTasksError as error:
            outcomes.append(error.tasks)
    return outcomes


def test_tasks_share_the_work(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    # The last task of each round finds a stage complete and does its share of the next.
    assert run_tasks(source, out, 3) == [[1, 2], [2], [0, 1]]
    assert run_tasks(source, out, 3) == [[1], [0, 2], [0]]
    assert run_tasks(source, out, 3) == [None, None, None]
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_work_of_tasks_can_be_finished_by_another_number_of_them(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_tasks(source, out, 3)
    run_tasks(source, out, 2)
    with pytest.raises(UnfinishedTasksError, match=r"units are not done.*without --finish"):
        prepare(source, out, finish_only=True)
    assert prepare(source, out).counts.documents < NUM_DOCUMENTS
    assert contents(out) == expected


def test_tasks_refuse_other_options_and_force(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_tasks(source, out, 2)
    other = dataclasses.replace(SMALL, seed=9)
    with pytest.raises(DatasetExistsError, match=r"seed was 3, now 9.*remove "):
        prepare(source, out, task=Task(0, 2), options=other)
    with pytest.raises(ValueError, match="undo the work of the others"):
        prepare(source, out, task=Task(0, 2), force=True)
    with pytest.raises(ValueError, match="numbered from 0 to 1"):
        Task(2, 2)


def test_a_run_of_its_own_and_a_task_exclude_each_other(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        workspace_module.workspace(out, Task(0, 2)),
        pytest.raises(ValueError, match="another process is preparing"),
    ):
        prepare(source, out)
    with workspace_module.workspace(out, Task(0, 2)) as space:
        space.begin()
        with pytest.raises(ValueError, match="another process is preparing task 0"):
            prepare(source, out, task=Task(0, 2))
        with pytest.raises(UnfinishedTasksError):
            prepare(source, out, task=Task(1, 2))


class FullDisk:
    """A file on a disk with room for some more bytes, for all files together."""

    room = 0

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        FullDisk.room -= len(data)
        if FullDisk.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def test_full_disk_keeps_what_is_done_and_the_old_dataset(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prepare(source, out, options=dataclasses.replace(SMALL, seed=9))
    before = contents(out)
    opened = workspace_module.open_partial
    with monkeypatch.context() as patched:
        patched.setattr(workspace_module, "open_partial", lambda path: FullDisk(opened(path)))
        FullDisk.room = 20_000
        with pytest.raises(OSError, match=r"nothing was left behind.*free space") as caught:
            prepare(source, out, force=True)
        assert caught.value.errno == errno.ENOSPC
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        FullDisk.room = 200_000
        with pytest.raises(OSError, match=r"about \d+ MiB more are needed.*finished work is kept.*free space"):
            prepare(source, out, force=True)
    assert contents(out) == before
    assert not list((tmp_path / ".out.preparing" / "partial").iterdir())
    report = prepare(source, out, force=True)
    assert report.counts.documents < NUM_DOCUMENTS
    assert contents(out) == expected


def test_full_disk_in_a_worker_is_the_same_error(source: Path, tmp_path: Path) -> None:
    script = (
        "from data_pipeline.prepare import text\n"
        "from data_pipeline.prepare.text import PrepareOptions, prepare_text\n"
        "text._WORTH_READING = text._WORTH_WRITING = 0\n"
        "if __name__ == '__main__':\n"
        f"    prepare_text({str(source)!r}, {str(tmp_path / 'out')!r}, options={SMALL!r}, workers=2)\n"
    )
    failed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        check=False,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, 14_000)),
    )
    assert failed.returncode == 1
    assert b"File too large while preparing" in failed.stderr
    assert b"free space" in failed.stderr


def kill_at(source: Path, out: Path, wanted: str, count: int) -> None:
    script = KILLING.format(
        wanted=wanted, count=count, before=False, source=str(source), out=str(out), options=SMALL, piece=PIECE
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False).returncode == -signal.SIGKILL


def test_other_options_do_not_take_up_unfinished_work(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_at(source, out, "/spill/", 10)
    other = dataclasses.replace(SMALL, seed=9)
    with pytest.raises(DatasetExistsError, match=r"unfinished work.*seed was 3, now 9.*--force"):
        prepare(source, out, options=other)
    prepare(source, out, options=other, force=True)
    prepare(source, tmp_path / "fresh", options=other)
    assert contents(out) == contents(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def test_mended_file_costs_only_its_own_pieces(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sample would find the damage in so small a file before any work is done.
    monkeypatch.setattr(plan_module, "sample_documents", lambda corpus, field: Sample([b"some text"], 1.0))
    # With a given tokenizer and nothing held out, nothing else depends on the file that changes.
    options = dataclasses.replace(SMALL, validation_fraction=0, tokenizer=str(dataset / "tokenizer.json"))
    source, out = tmp_path / "source", tmp_path / "out"
    texts = random_texts(90)
    for number in range(3):
        write_jsonl(source / f"{number}.jsonl", texts[number::3])
    packed = source / "3.jsonl.gz"
    whole = gzip.compress((source / "2.jsonl").read_bytes(), mtime=0)
    packed.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"3.jsonl.gz: byte \d+: the gzip stream ends too early.*What to do"):
        prepare(source, out, options=options)
    packed.write_bytes(whole)
    with pytest.raises(DatasetExistsError, match=r"the input files have changed.*--force"):
        prepare(source, out, options=options)
    report = prepare(source, out, options=options, force=True)
    assert 30 <= report.counts.documents < 60  # its piece also holds the end of the file before
    prepare(source, tmp_path / "fresh", options=options)
    assert Manifest.load(out).fingerprint == Manifest.load(tmp_path / "fresh").fingerprint


def test_damaged_spill_is_named_and_made_again(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_at(source, out, "/shards/", 1)
    spill = next(path for path in sorted((tmp_path / ".out.preparing" / "spill").glob("*.bin")))
    raw = bytearray(spill.read_bytes())
    raw[-5] ^= 1
    spill.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"{spill.name}.*do not match their xxh3 hash.*remove this file"):
        prepare(source, out)
    spill.unlink()
    assert prepare(source, out).counts.documents < NUM_DOCUMENTS
    assert contents(out) == expected
