"""The alarm of an attempt that does not move: report first, then an end at once. Torch-free."""

from __future__ import annotations

from launchers.hang import Watch
from launchers.hang_report import write_report
from launchers.lifecycle.attempt import say
from launchers.lifecycle.exit_class import ExitClass, StopReason
from launchers.lifecycle.ranks import Ranks
from launchers.run_dir import RunDir
from pretrain.config.schema import Config


class HangAlarm:
    """Looks at the heartbeats in every round; gives its reason once."""

    def __init__(self, run: RunDir, attempt: int, config: Config, ranks: Ranks) -> None:
        self._run = run
        self._attempt = attempt
        self._ranks = ranks
        self._watch: Watch | None = Watch(run, attempt, config)

    def poll(self) -> StopReason | None:
        """Why the attempt must end, with the report's path; the stacks of all ranks are in it."""
        if self._watch is None or (hang := self._watch.poll()) is None:
            return None
        self._watch = None
        report = None
        try:
            report = str(write_report(self._run, self._attempt, hang, ask_for_stacks=self._ranks.dump_stacks))
            say(f"the attempt hangs; report: {report}")
        except OSError as error:
            say(f"the attempt hangs; its report cannot be written: {error}")
        return StopReason(ExitClass.HANG, hang.reason, hang.rank, hang.node, report)
