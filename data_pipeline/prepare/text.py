"""Preparing text: files in, one verified dataset folder out, whatever the size.

An external shuffle that can be stopped anywhere and taken up again. The *survey* (where one is needed) looks at
every document to choose what is held out and what trains the tokenizer. *Tokenising* gives every document a
key, tokens and a bucket, and leaves large spills. *Writing* gathers one bucket from all spills, sorts it by key
and writes it as a shard; since keys are uniform, the whole dataset is one global shuffle. Work is done in units
that do not depend on each other, so processes and tasks only divide it: the shards are the same bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.errors import DatasetExistsError
from data_pipeline.prepare import finishing, stages
from data_pipeline.prepare.corpus import Corpus, stdlib_corpus, text_corpus
from data_pipeline.prepare.encoding import BACKENDS
from data_pipeline.prepare.metering import Counts, Drops, Progress, Status
from data_pipeline.prepare.options import PrepareOptions
from data_pipeline.prepare.options import choose_block_tokens as choose_block_tokens
from data_pipeline.prepare.options import choose_num_lanes as choose_num_lanes
from data_pipeline.prepare.plan import PLAN_NAME, Plan, make_plan
from data_pipeline.prepare.pool import Workers
from data_pipeline.prepare.request import REQUEST_NAME, Request, cut_pieces
from data_pipeline.prepare.survey import HeldOut, Survey, exact_split, wanted
from data_pipeline.prepare.tokenizer import TokenizerFile, load_tokenizer_file, train_byte_level_bpe
from data_pipeline.prepare.workspace import DISK_FULL, Task, Workspace, workspace
from data_pipeline.store.manifest import MANIFEST_NAME, Manifest
from data_pipeline.wording import counted

Source = str | os.PathLike[str]
_PHASES = {stages.SURVEY: "reading documents", stages.TOKENISE: "tokenising", stages.WRITE: "writing shards"}
# Starting processes takes about a second: work on fewer bytes than these is done without.
_WORTH_READING, _WORTH_WRITING = 1 << 21, 1 << 26


class UnfinishedTasksError(RuntimeError):
    """The work of other tasks is missing, so this one cannot go on; ``tasks`` are to be run (again)."""

    def __init__(self, message: str, tasks: list[int]) -> None:
        super().__init__(message)
        self.tasks = tasks


@dataclass(frozen=True)
class PrepareReport:
    """What was done: ``reused`` when the folder already held exactly this dataset. ``counts`` and
    ``tokenize_seconds`` are of this run alone, not of one that it took up; ``seconds`` of wall time."""

    manifest: Manifest
    reused: bool
    seconds: float
    tokenize_seconds: float
    counts: Counts


def prepare_text(
    source: Source | Sequence[Source],
    out: Source,
    *,
    pattern: str = "**/*",
    file_format: str = "auto",
    options: PrepareOptions | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    backend: str = "auto",
    task: Task | None = None,
    finish_only: bool = False,
    append: bool = False,
    piece_bytes: int | None = None,
) -> PrepareReport:
    """Prepare text as a dataset in ``out``, or with ``append`` add it to the dataset there.

    ``source`` is one or several folders (files that match ``pattern``), files, globs or fsspec URLs; formats are
    told by name (``.jsonl``, ``.parquet``, anything else is one document a file; ``.gz`` and ``.zst`` around
    them) unless ``file_format`` of ``corpus.FORMATS`` says so. Documents that cannot be used are dropped, counted
    and listed in the manifest's ``origin``.

    The result does not depend on ``workers`` (processes; None: the usable cores), ``backend`` (of
    ``encoding.BACKENDS``), ``task`` (a share of the work, when several commands do it), ``piece_bytes`` (size of
    a unit of work) nor on how often the work was stopped. Nothing appears under the name ``out`` before it is
    complete; appending replaces the manifest last.

    Raises ValueError for unusable input, DatasetExistsError when ``out`` or unfinished work is of something else
    and ``force`` is not given, UnfinishedTasksError when other tasks have work left, ChildProcessError when a
    process dies, OSError when reading or writing fails (a full disk included); finished work is kept.
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    target = Path(os.path.abspath(out))
    preparation = _Preparation(
        target, options or PrepareOptions(), workers, force, progress, backend, task, finish_only, append, piece_bytes
    )
    return preparation.run(lambda: text_corpus(sources, pattern, file_format, exclude=target))


def prepare_stdlib(
    out: Source,
    *,
    options: PrepareOptions | None = None,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    backend: str = "auto",
) -> PrepareReport:
    """Prepare the source files of the running interpreter's standard library; otherwise as
    :func:`prepare_text`."""
    target = Path(os.path.abspath(out))
    return _Preparation(target, options or PrepareOptions(), workers, force, progress, backend).run(stdlib_corpus)


@dataclass
class _Preparation:
    out: Path
    options: PrepareOptions
    workers: int | None
    force: bool
    progress: Progress | None
    backend: str
    task: Task | None = None
    finish_only: bool = False
    append: bool = False
    piece_bytes: int | None = None

    def run(self, list_corpus: Callable[[], Corpus]) -> PrepareReport:
        self._started = time.perf_counter()
        self._totals = Counts()
        self._tokenize_seconds = 0.0
        self._check()
        corpus = list_corpus()
        with workspace(self.out, self.task) as space:
            existing = Manifest.load(self.out) if self.append else None
            if existing is not None:
                self.options = finishing.options_for_append(self.options, existing)
            given = load_tokenizer_file(self.options.tokenizer) if self.options.tokenizer is not None else None
            fingerprint = None if existing is None else existing.fingerprint
            request = Request(corpus, self.options, given, self.backend, [], fingerprint)
            if existing is None:
                found = self._find_existing(space, request)
            else:
                found = existing if finishing.holds(existing, request) else None
            if found is not None:
                if self.task is None:
                    space.discard()
                return self._report(found, reused=True)
            try:
                return self._report(self._work(space, request, existing), reused=False)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                raise self._disk_full(space, error) from error

    def _check(self) -> None:
        self._workers = self.workers if self.workers is not None else len(os.sched_getaffinity(0))
        if self._workers < 1:
            raise ValueError(f"workers {self._workers} must be at least 1")
        if self.piece_bytes is not None and self.piece_bytes < 1:
            raise ValueError(f"piece bytes {self.piece_bytes} must be at least 1")
        if self.backend not in BACKENDS:
            raise ValueError(f"tokenizer backend {self.backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
        if self.task is not None and self.force:
            raise ValueError(
                "--force cannot be given to one of several tasks, which would undo the work of the others. "
                f"What to do: remove {self.out} (and .{self.out.name}.preparing beside it), then start the tasks."
            )

    def _report(self, manifest: Manifest, reused: bool) -> PrepareReport:
        seconds = time.perf_counter() - self._started
        return PrepareReport(manifest, reused, seconds, self._tokenize_seconds, self._totals)

    def _find_existing(self, space: Workspace, request: Request) -> Manifest | None:
        if self.force or not (space.out / MANIFEST_NAME).exists():
            return None
        return finishing.check_existing(space.out, request)

    def _work(self, space: Workspace, request: Request, existing: Manifest | None) -> Manifest:
        request = self._take_up(space, request)
        with Workers(self._workers, stages.Stages, space.folder.path, space.folder.writer) as pool:
            plan = self._read_plan(space, request) or self._make_plan(space, request, existing, pool)
            self._totals = Counts()
            started = time.perf_counter()
            self._run_stage(space, pool, stages.TOKENISE, len(request.pieces), request, plan)
            self._tokenize_seconds = time.perf_counter() - started
            self._check_documents(space, request)
            self._run_stage(space, pool, stages.WRITE, plan.num_buckets, request, plan)
        return self._finish(space, request, plan, existing)

    def _finish(self, space: Workspace, request: Request, plan: Plan, existing: Manifest | None) -> Manifest:
        try:
            if existing is None:
                return finishing.finish(space, request, plan)
            return finishing.finish_append(space, request, plan, existing)
        except FileNotFoundError:
            # Another task found everything done at the same moment, and was faster.
            manifest = Manifest.load(self.out) if self.task is not None else None
            if manifest is None or not finishing.holds(manifest, request):
                raise
            return manifest

    def _take_up(self, space: Workspace, request: Request) -> Request:
        """The frozen request: of the work that is there, or of this command."""
        tree = space.folder.read_json(REQUEST_NAME)
        if tree is not None and tree["work_choices"] != request.work_choices:
            self._refuse_other_work(
                space, tree, "its options differ" + finishing.differences(tree["work_choices"], request.work_choices)
            )
            space.discard()
            tree = None
        if tree is not None and tree["digest"] != request.digest:
            self._refuse_other_work(space, tree, "the input files have changed")
            tree = None  # units that the change does not touch stay valid
        space.begin()
        if tree is None:
            pieces = cut_pieces(request.corpus, request.options.text_field, self.piece_bytes)
            frozen = replace(request, pieces=pieces).to_json()
            space.folder.write_json(REQUEST_NAME, frozen, first_wins=self.task is not None)
            tree = space.folder.read_json(REQUEST_NAME)
        return Request.from_json(tree)

    def _refuse_other_work(self, space: Workspace, tree: dict[str, Any], difference: str) -> None:
        if self.task is None and (self.force or not space.has_work()):
            return
        way_out = "start anew with --force" if self.task is None else f"remove {space.folder.path}"
        raise DatasetExistsError(
            f"{space.folder.path} holds unfinished work of another preparation (of {tree['corpus']['name']}; "
            f"{difference}). What to do: run that one again to finish it, or {way_out}; work on unchanged files is "
            "kept where the options are the same."
        )

    def _read_plan(self, space: Workspace, request: Request) -> Plan | None:
        tree = space.folder.read_json(PLAN_NAME)
        return Plan.from_json(tree["plan"]) if tree is not None and tree["of"] == request.digest else None

    def _make_plan(self, space: Workspace, request: Request, existing: Manifest | None, pool: Workers) -> Plan:
        survey = None
        held_out = HeldOut(0 if request.appends_to else int(request.options.validation_fraction * 2**64))
        if wanted(request):
            self._run_stage(space, pool, stages.SURVEY, len(request.pieces), request, None)
            survey = Survey.load(request, space.folder)
            if not survey.documents:
                raise self._nothing_usable(space, request, survey.drops)
            if exact_split(request):
                held_out = survey.held_out(request.options.validation_fraction)
        tokenizer = request.given or self._train(survey, held_out)
        if existing is not None:
            finishing.write_held_out(space, existing)
        content = None if existing is None else existing.content
        plan = make_plan(request, tokenizer, held_out, None if survey is None else survey.bytes, content)
        space.folder.write_json(
            PLAN_NAME, {"of": request.digest, "plan": plan.to_json()}, first_wins=self.task is not None
        )
        frozen = self._read_plan(space, request)
        assert frozen is not None
        return frozen

    def _train(self, survey: Survey | None, held_out: HeldOut) -> TokenizerFile:
        assert survey is not None
        started = time.perf_counter()

        def show(done: int, total: int) -> None:
            self._show("training the tokenizer", done, total, "bytes", Counts(bytes=done), started)

        return train_byte_level_bpe(survey.training_texts(held_out, show), self.options.vocab_size)

    def _run_stage(
        self, space: Workspace, pool: Workers, stage: str, num_units: int, request: Request, plan: Plan | None
    ) -> None:
        """Do what is left of this task's share of a stage. Raises UnfinishedTasksError when others have work left."""
        done = stages.find_done(space.folder, stage, num_units, request, plan)
        share = range(num_units) if self.task is None else range(self.task.index, num_units, self.task.count)
        todo = [] if self.finish_only else [unit for unit in share if unit not in done]
        self._do(pool, stage, todo, [unit for unit in share if unit in done], request, plan)
        done = stages.find_done(space.folder, stage, num_units, request, plan)
        missing = [unit for unit in range(num_units) if unit not in done]
        if missing:
            raise self._unfinished(stage, missing, num_units)

    def _do(
        self, pool: Workers, stage: str, todo: list[int], earlier: list[int], request: Request, plan: Plan | None
    ) -> None:
        phase, started, counts = _PHASES[stage], time.perf_counter(), Counts()
        reading = stage != stages.WRITE
        sizes = request.piece_size if reading else (lambda unit: 1)
        before = sum(map(sizes, earlier))
        total = before + sum(map(sizes, todo))
        size = total - before if reading or plan is None else plan.shard_bytes * len(todo)
        worthwhile = size >= (_WORTH_READING if reading else _WORTH_WRITING)
        finished = 0

        def show(read: int = 0) -> None:
            # What is read is not done before its unit is.
            done = max(finished, min(read, total - before - 1))
            self._show(phase, before + done, total, "bytes" if reading else "shards", counts, started, before)

        def add(more: Counts) -> None:
            counts.add(more)
            self._totals.add(more)
            show(counts.read if reading else 0)

        for unit in pool.run(stage, todo, add, worthwhile):
            finished += sizes(unit)
            show(counts.read if reading else 0)
        finished = total - before
        show()

    def _show(
        self, phase: str, done: int, total: int, unit: str, counts: Counts, started: float, earlier: int = 0
    ) -> None:
        if self.progress is not None:
            self.progress(Status(phase, done, total, unit, counts, time.perf_counter() - started, earlier))

    def _unfinished(self, stage: str, missing: Iterable[int], num_units: int) -> UnfinishedTasksError:
        missing = list(missing)
        of = f"{_PHASES[stage]}: {len(missing)} of {num_units} units are not done"
        if self.task is None:
            return UnfinishedTasksError(f"{of}. What to do: run the command without --finish to do them.", [])
        tasks = sorted({unit % self.task.count for unit in missing})
        named = ", ".join(map(str, tasks))
        return UnfinishedTasksError(
            f"{of}, of task {named} (of {self.task.count}). What to do: when those tasks have ended, run all tasks "
            "again; what is done is not done again.",
            tasks,
        )

    def _check_documents(self, space: Workspace, request: Request) -> None:
        markers = finishing.tokenise_markers(space.folder, len(request.pieces))
        if not any(marker["documents"] for marker in markers):
            raise self._nothing_usable(space, request, Drops.merged(marker["dropped"] for marker in markers))

    def _nothing_usable(self, space: Workspace, request: Request, drops: Drops) -> ValueError:
        if self.task is None:
            space.discard()
        tree = drops.to_json()
        first = (
            f"; the first, {tree['examples'][0]['path']}, is {tree['examples'][0]['why']}" if tree["examples"] else ""
        )
        files = len(request.corpus.files)
        return ValueError(
            f"none of the documents in {counted(files, 'file')} of {request.corpus.root} can be used{first}. "
            "What to do: check the input, --pattern, --format and --text-field."
        )

    def _disk_full(self, space: Workspace, error: OSError) -> OSError:
        tree = space.folder.read_json(PLAN_NAME)
        there = space.folder.size()
        room = ""
        if tree is not None:
            left = max(Plan.from_json(tree["plan"]).needed_bytes - there, 0)
            room = f"about {left // 2**20 + 1:,} MiB more are needed besides the {there // 2**20 + 1:,} MiB there; "
        kept = "finished work is kept" if space.has_work() or self.task is not None else "nothing was left behind"
        return OSError(
            error.errno,
            f"{os.strerror(error.errno or 0)} while preparing {self.out}; {room}{kept}. What to do: free space (or "
            "choose another folder) and run the same command again",
        )
