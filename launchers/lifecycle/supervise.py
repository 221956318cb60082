"""The supervisor: attempt after attempt until the run is over or its nodes are given back. Torch-free.

One process for a run: ``pretrain run`` itself on a workstation, the batch script on a cluster. It starts the ranks
through a :class:`~launchers.lifecycle.backend.Backend`, follows them (:mod:`launchers.lifecycle.attempt`), says why
they ended (:mod:`launchers.lifecycle.exit_class`) and does what the policy decides
(:mod:`launchers.lifecycle.policy`). Every step is in the journal.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launchers.exit_codes import ExitCode
from launchers.lease import Lease
from launchers.lifecycle import cancellation, journal
from launchers.lifecycle.attempt import Attempt, Display, say
from launchers.lifecycle.backend import Backend, StartError, TooFewNodesError
from launchers.lifecycle.deadline import Deadline, Pace
from launchers.lifecycle.evidence import Steps, describe_failure, gather, last_sign_of_life, steps_of
from launchers.lifecycle.exclusions import excluded_nodes
from launchers.lifecycle.exit_class import ExitClass, StopReason, Verdict, classify
from launchers.lifecycle.hanging import HangAlarm
from launchers.lifecycle.policy import Decision, Place, Progress, decide
from launchers.lifecycle.ranks import Ranks
from launchers.outcome import record_end, record_failure
from launchers.run_dir import RunDir
from pretrain.config.files import way_out
from pretrain.config.launch_schema import Action
from pretrain.config.schema import Config

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_TAKE_THE_NODES = (ExitClass.PREEMPTED, ExitClass.TIME_LIMIT, ExitClass.NODE_FAILURE)

_WRITING_S = 3.0
"""Of the time that a batch system leaves, what is kept for the journal and the queue."""


@dataclass
class Supervisor:
    """Supervises ``run`` from the attempt that ``lease`` holds.

    Args:
        program: program and arguments of every rank; ``first_arguments`` are added in the first attempt.
        command: what is recorded as the attempt's command.
        open_display: the display of one attempt.
        between_attempts: called beside the start of the next attempt, as to bring a tracker up to date.
    """

    run: RunDir
    backend: Backend
    lease: Lease
    config: Config
    program: Sequence[str]
    command: Sequence[str]
    first_arguments: Sequence[str] = ()
    open_display: Callable[[RunDir, int], Display] | None = None
    between_attempts: Callable[[], object] | None = None
    lease_job: dict[str, Any] = field(default_factory=dict)
    received: list[int] = field(default_factory=list)

    def supervise(self) -> Outcome:
        """Runs attempts until one is the last here. Call it from the main thread: signals arrive there.

        Raises LeaseHeldError when another process takes the run directory between two attempts.
        """
        extra = list(self.first_arguments)
        with self._signals():
            if (outcome := self._close_unfinished()) is not None:
                return outcome
            while True:
                outcome = self._attempt([*self.program, *extra])
                if not outcome.decision.at_once or outcome.fenced:
                    return outcome
                if self.between_attempts is not None:
                    threading.Thread(target=self.between_attempts, daemon=True).start()
                extra = []  # the chosen checkpoint was the first attempt's: this one continues from the latest
                say(f"{outcome.decision.reason}. Starting the next attempt.")
                self.lease.release()
                self.lease = Lease.acquire(self.run, after=self.lease, **self.lease_job)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Handlers for the whole of this: a signal between two attempts must not be lost, nor leave ranks behind."""
        previous = {
            number: signal.signal(number, lambda received, _frame: self.received.append(received))
            for number in _FORWARDED
            # What the caller ignores (SIGHUP under nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _close_unfinished(self) -> Outcome | None:
        """Records the end of an attempt whose supervisor could not: it vanished with its node, or was killed.

        Inside a job, which came back by itself, the policy is asked about that end too: an outcome that stops it is
        returned.
        """
        history = journal.read_journal(self.run)
        begun = [index for index, entry in enumerate(history) if entry["event"] == "attempt_started"]
        if not begun or any(entry["event"] == "attempt_ended" for entry in history[begun[-1] :]):
            return None
        last = history[begun[-1]]
        gave_up = journal.last_entry(history[begun[-1] :], "gave_up")
        verdict = (
            Verdict(ExitClass.CRASH, f"the supervisor of attempt {last['attempt']} gave up: {gave_up['message']}")
            if gave_up is not None
            else self.backend.vanished(last, last_sign_of_life(self.run, last))
        )
        steps = steps_of(self.run, last["attempt"])
        own_life = self.backend.queue and last.get("job") == self.backend.job
        if any(entry["event"] == "cancelled" for entry in history[begun[-1] :]):
            # Whoever has the job run again all the same overrules that: it was the end of that attempt alone.
            own_life, words = False, "the job was cancelled, and ended before its ranks had"
            verdict = Verdict(ExitClass.INTERRUPTED, words)
        if not own_life:
            decision = Decision("stop", False, (), f"{verdict.reason}; its user started the run again")
        else:
            decision = decide(
                verdict,
                Progress(steps.first, steps.last),
                history,
                self.config.lifecycle,
                self.config.launcher.max_restarts,
                Place(queue=True, can_stay=False, can_stay_without=False),
            )
            if decision.action != "stop":
                # It has been done already: this is the life after it.
                decision = Decision("requeue", False, decision.excluded, decision.reason)
        self._write_end(last["attempt"], verdict, decision, steps)
        if own_life and decision.action == "stop":
            return Outcome(_exit_code(verdict, None), verdict, decision)
        return None

    # ---- one attempt -------------------------------------------------------------------------------------------------

    def _attempt(self, program: Sequence[str]) -> Outcome:
        run, number = self.run, self.lease.attempt
        history = journal.read_journal(run)
        excluded = excluded_nodes(history)
        try:
            self.config = self.backend.prepare(run, self.config, excluded)
        except TooFewNodesError as error:
            return self._end(Verdict(ExitClass.NODE_FAILURE, str(error)), Steps(), history, None)
        run.record_attempt(number, self.command)
        nodes = self.backend.nodes(self.config)
        journal.append(
            run,
            "attempt_started",
            attempt=number,
            launcher=self.backend.name,
            job=self.backend.job,
            nodes=nodes,
            num_processes=self.config.launcher.num_processes,
        )
        try:
            if trouble := self.backend.check_nodes(run, self.config, number):
                words = f"the check before training failed: {trouble.words}"
                if (told := self._told()) is not None:
                    return self._end_as_told(told, words, history)
                verdict = Verdict(ExitClass.NODE_FAILURE, words, node=trouble.nodes[0])
                return self._end(verdict, Steps(), history, None, also_excluded=trouble.nodes[1:])
            with self.backend.start(run, self.config, number, program) as ranks:
                attempt = self._follow(ranks)
                evidence = gather(run, self.config, number, ranks, attempt, self.backend)
        except StartError as error:
            if (told := self._told()) is not None:
                return self._end_as_told(told, str(error), history)
            return self._end(Verdict(error.exit_class, str(error)), Steps(), history, None)
        verdict = classify(evidence)
        if verdict.exit_class == ExitClass.INTERRUPTED and evidence.stop is not None and evidence.stop.enforced:
            self._note_cancelled()  # told by the batch system alone: its signal had not been heard yet
        return self._end(verdict, steps_of(run, number), history, attempt)

    def _follow(self, ranks: Ranks) -> Attempt:
        backend, run = self.backend, self.run
        attempt = Attempt(
            ranks,
            self.config.launcher.shutdown_grace_s,
            self.received,
            self._meaning_of,
            second_kills=backend.second_signal_kills,
            enforced_grace_s=max(1.0, backend.kill_wait_s - _WRITING_S),
            display=self.open_display(run, self.lease.attempt) if self.open_display is not None else None,
            lost=self.lease.lost,
            reasons=(self._cancelled, Deadline(run.metrics_path, self.config.lifecycle, backend.end_time).poll),
            alarms=(self._cancelled_now, HangAlarm(run, self.lease.attempt, self.config, ranks).poll),
        )
        try:
            attempt.follow()
        finally:
            attempt.close_display()
        return attempt

    def _meaning_of(self, number: int) -> StopReason | None:
        # `pretrain cancel` leaves its wish first and may then send a signal to be heard at once.
        reason = self._cancelled() or self.backend.reason_of(number)
        if reason is not None and reason.enforced and reason.exit_class == ExitClass.INTERRUPTED:
            # At once: the ranks may take longer to end than the batch system leaves this process.
            self._note_cancelled()
        return reason

    def _requests(self, attempt: Attempt | None = None) -> Iterator[StopReason]:
        """What was asked of this process: by its user, by signals, and of ``attempt`` by whoever stopped it."""
        if attempt is not None and attempt.stop is not None:
            yield attempt.stop
        if (reason := self._cancelled()) is not None:
            yield reason
        for number in list(self.received):
            if (reason := self._meaning_of(number)) is not None:
                yield reason

    def _told(self) -> StopReason | None:
        """Why this attempt must end before its ranks began, whatever became of its start: a batch system that ends a
        job strikes the commands that were to start them, too."""
        asked = [*self._requests()]
        if (reason := self.backend.reason_of(None)) is not None:
            asked.append(reason)
            if reason.enforced and reason.exit_class == ExitClass.INTERRUPTED:
                self._note_cancelled()
        return next((reason for reason in asked if reason.exit_class == ExitClass.INTERRUPTED), next(iter(asked), None))

    def _end_as_told(self, told: StopReason, words: str, history: Sequence[journal.Entry]) -> Outcome:
        down = self.backend.down_nodes(self.config) if told.exit_class == ExitClass.NODE_FAILURE else []
        node = down[0] if down else told.node
        verdict = Verdict(told.exit_class, f"{told.words}, before the ranks had started ({words})", node=node)
        return replace(self._end(verdict, Steps(), history, None), enforced=told.enforced)

    def _note_cancelled(self) -> None:
        begun_or_cancelled = journal.last_entry(journal.read_journal(self.run), "attempt_started", "cancelled")
        if begun_or_cancelled is None or begun_or_cancelled["event"] != "cancelled":
            with contextlib.suppress(OSError):
                journal.append(self.run, "cancelled", job=self.backend.job)

    def _cancelled(self) -> StopReason | None:
        if cancellation.read(self.run) is None:
            return None
        return StopReason(ExitClass.INTERRUPTED, "cancelled by its user")

    def _cancelled_now(self) -> StopReason | None:
        wish = cancellation.read(self.run)
        if wish is None or not wish.now:
            return None
        return StopReason(ExitClass.INTERRUPTED, "cancelled by its user, without a checkpoint")

    # ---- its end -----------------------------------------------------------------------------------------------------

    def _end(
        self,
        verdict: Verdict,
        steps: Steps,
        history: Sequence[journal.Entry],
        attempt: Attempt | None,
        also_excluded: Sequence[str] = (),
    ) -> Outcome:
        run, number, config = self.run, self.lease.attempt, self.config
        failure = attempt.first_failure if attempt is not None else None
        rank = verdict.rank if verdict.code is not None else failure.rank if failure is not None else None
        code = _exit_code(verdict, failure.code if failure is not None else None)
        if attempt is not None and attempt.fenced:
            return Outcome(code, verdict, Decision("stop", False, (), "the run directory was lost"), fenced=True)
        out = excluded_nodes(history)
        at_fault = {*also_excluded, *((verdict.node,) if verdict.node else ())}
        place = Place(
            queue=self.backend.queue,
            can_stay=self.backend.can_stay(run, config, out),
            can_stay_without=self.backend.can_stay(run, config, out | at_fault),
            time_enough=self._time_enough(steps),
        )
        decision = decide(
            verdict,
            Progress(steps.first, steps.last),
            history,
            config.lifecycle,
            config.launcher.max_restarts,
            place,
        )
        decision = self._as_asked(decision, attempt)
        if decision.action == "exclude":
            decision = Decision("exclude", decision.at_once, (*decision.excluded, *also_excluded), decision.reason)
        if rank is not None and code not in (ExitCode.FINISHED, ExitCode.RESUMABLE):
            log = run.rank_log_path(number, rank)
            with _as_far_as_possible():
                record_failure(run, number, rank, code, log)
            say(describe_failure(rank, code, log))
        with _as_far_as_possible():
            record_end(run, number, code)
        decision = self._record(number, verdict, decision, steps)
        enforced = attempt is not None and attempt.stop is not None and attempt.stop.enforced
        return Outcome(code, verdict, decision, enforced=enforced)

    def _as_asked(self, decision: Decision, attempt: Attempt | None) -> Decision:
        """What was asked of this process counts more than what an end calls for, as when a rank dies while it saves or
        a signal comes after the last end: its user's wish to stop, and then a batch system's for the nodes."""
        if decision.action == "stop":
            return decision
        asked = list(self._requests(attempt))
        for reason in asked:
            if reason.exit_class == ExitClass.INTERRUPTED:
                by = "stopped by a signal" if self.received else reason.words
                return Decision("stop", False, (), f"{decision.reason}; {by}")
        leave = next((reason for reason in asked if reason.exit_class in _TAKE_THE_NODES), None)
        if decision.at_once and leave is not None:
            action: Action = "exclude" if decision.action == "exclude" else "requeue"
            return Decision(action, False, decision.excluded, f"{decision.reason}, but {leave.words}")
        return decision

    def _record(self, number: int, verdict: Verdict, decision: Decision, steps: Steps) -> Decision:
        """Journals the end. What was decided is done also when that fails, but for another attempt on a full disk."""
        try:
            self._write_end(number, verdict, decision, steps)
        except OSError as error:
            words = f"{self.run.lifecycle_path} cannot be written ({error.strerror or error})"
            way = f"{way_out(error)}, then continue with: pretrain resume {self.run.path}"
            say(f"error: attempt {number} ended ({verdict.exit_class}: {verdict.reason}), but {words}; {way}")
            if decision.at_once:
                return Decision("stop", False, (), f"{verdict.reason}; {words}")
        return decision

    def _write_end(self, number: int, verdict: Verdict, decision: Decision, steps: Steps) -> None:
        journal.append_making_room(
            self.run,
            number,
            "attempt_ended",
            attempt=number,
            exit_class=str(verdict.exit_class),
            action=decision.action,
            reason=decision.reason,
            first_step=steps.first,
            last_step=steps.last,
            saved_step=steps.saved,
            rank=verdict.rank,
            node=verdict.node,
            code=verdict.code,
            report=verdict.report,
            exclude=list(decision.excluded),
        )

    def _time_enough(self, steps: Steps) -> bool:
        pace = Pace(self.run.metrics_path)
        pace.update()
        end = self.backend.end_time()
        return pace.time_enough(self.config.lifecycle, now=time.time(), end=end, startup=steps.startup_s)


@dataclass(frozen=True)
class Outcome:
    """How supervision ended here: exit code of the ranks, verdict, and what is still to be done with the nodes.

    ``fenced``: another process holds the run directory; nothing more may be written. ``enforced``: a batch system is
    ending this process already.
    """

    code: int
    verdict: Verdict
    decision: Decision
    fenced: bool = False
    enforced: bool = False


@contextlib.contextmanager
def _as_far_as_possible() -> Iterator[None]:
    """What metrics.jsonl cannot take on a full disk must not keep the decision from the journal."""
    try:
        yield
    except OSError as error:
        say(f"the end of the attempt cannot be recorded in metrics.jsonl: {error}")


def _exit_code(verdict: Verdict, first_failure: int | None) -> int:
    """The code for the caller: the culprit's, else that of the rank that failed first."""
    if verdict.code is not None:
        return verdict.code
    if first_failure is not None:
        return first_failure
    return int(ExitCode.FAILED)


def default_program(run: RunDir) -> list[str]:
    """What every rank runs."""
    return [sys.executable, "-m", "pretrain.training.entry", str(run.path)]
