"""Entry of one rank: ``python -m pretrain.training.entry RUN_DIR [--checkpoint NAME]``.

Reads the frozen configuration only, joins the other ranks and trains. Exit codes are those of
:mod:`launchers.exit_codes`; they reach the launcher unchanged.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import logging
import os
import socket
import sys
import threading
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launchers.exit_codes import ExitCode
from pretrain.parallel.pulse import PULSE
from pretrain.training.heartbeat import Heart, Place
from pretrain.training.signals import StopRequest, StopRequestedError

if TYPE_CHECKING:
    from launchers.run_dir import RunDir
    from pretrain.checkpoint.store import CheckpointStore
    from pretrain.config.schema import Config
    from pretrain.parallel.process import ProcessEnvironment
    from pretrain.training.health import HealthMonitor

logger = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    """Run one rank to its end; returns its exit code."""
    parser = argparse.ArgumentParser(prog="pretrain.training.entry", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--checkpoint", default=None, help="folder name or step to continue from (default: latest)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        stream=sys.stdout, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    # Installed before the slow imports, so that a stop request during start-up is honoured at the first step boundary.
    stop = StopRequest()
    stop.install()
    heart = _begin_to_tell(arguments.run_dir, stop)
    # Late for the same reason. Before the work: a process out of memory may find no room to import.
    from pretrain.training.failure import exit_code_of, record_end_of_rank

    try:
        code = _start(arguments.run_dir, arguments.checkpoint, stop, heart)
        record_end_of_rank(arguments.run_dir, code)
        return code
    except Exception as error:
        code = exit_code_of(error)
        if stop.requested and PULSE.phase == "start" and code in (ExitCode.FAILED, ExitCode.NODE_FAULT):
            # Nothing has been trained: ranks may leave one by one, and one that loses a peer by it leaves as well.
            logger.info("%s during start-up: %s", stop.signal_name, error)
            code = ExitCode.RESUMABLE
            record_end_of_rank(arguments.run_dir, code)
            return code
        record_end_of_rank(arguments.run_dir, code, error)
        if code == ExitCode.FAILED:
            traceback.print_exc()
        logger.error("%s", error)
        return code
    finally:
        if heart is not None:
            heart.close()


def _begin_to_tell(path: Path, stop: StopRequest) -> Heart | None:
    """The heartbeat of this rank, from before the slow imports on; None when this process is no rank of a run."""
    from launchers.run_dir import RunDir

    place = Place.read(os.environ)
    if place is None or not path.is_dir():
        return None
    heart = Heart(RunDir(path.absolute()), place, stop)
    heart.start()
    return heart


def _is_stuck() -> bool:
    """Whether a thread still waits for something that a stop request made nobody wait for any more."""
    return any(thread.name in ("data-prefetch", "while-waiting") for thread in threading.enumerate())


def _leave(code: int) -> NoReturn:
    """End the process, also where a thread is stuck.

    Python's own handlers of the end run, those of libraries in C do not, and no module is taken apart: with torch
    loaded that takes most of a second, for which the other ranks, or the next attempt, would wait.
    """
    if not _is_stuck():  # a pool of such a thread would be waited for without end
        threading._shutdown()  # type: ignore[attr-defined]  # ends pools, then waits for threads
        atexit._run_exitfuncs()
    for finish in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # a full disk must not change the code
            finish()
    os._exit(code)


def _start(path: Path, checkpoint: str | None, stop: StopRequest, heart: Heart | None) -> int:
    from launchers.run_dir import RunDir
    from pretrain.config.check import check
    from pretrain.parallel.process import ProcessEnvironment
    from pretrain.training.surroundings import check_surroundings

    env = ProcessEnvironment.read()
    run = RunDir.open(path)
    tree = run.config()
    config = check(tree)
    if heart is not None:
        heart.interval_s = config.lifecycle.heartbeat_interval_s
    check_surroundings(run, config, env)
    return _Rank(run, tree, config, env, stop).train(checkpoint)


class _Rank:
    """One rank's parts, from frozen configuration to exit code."""

    def __init__(
        self, run: RunDir, tree: dict[str, Any], config: Config, env: ProcessEnvironment, stop: StopRequest
    ) -> None:
        self.run = run
        self.tree = tree
        self.config = config
        self.env = env
        self.stop = stop
        self.log: Any = None
        self.state: Any = None
        self.tracker: Any = None
        self.monitor: Any = None
        self.stream: Any = None

    def train(self, checkpoint: str | None) -> int:
        import torch

        from pretrain.parallel.megatron_import import prepare_environment
        from pretrain.parallel.process import join_process_group, select_device

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        torch.manual_seed(self.config.run.seed)
        if self.config.engine.name == "megatron":
            prepare_environment()
        device = select_device(self.config.launcher.device, self.env.local_rank)
        self._fence()
        logger.info(
            "rank %d of %d on %s (node %d of %d), attempt %d, device %s, %d threads, torch %s",
            self.env.rank,
            self.env.world_size,
            socket.gethostname(),
            self.env.node_rank,
            self.env.num_nodes,
            self.env.attempt,
            device,
            torch.get_num_threads(),
            torch.__version__,
        )
        self._starting("joining the other ranks")
        join_process_group(self.env, device)
        try:
            self._open_log()
            self._phase("building model and engine")
            self._starting("opening data")
            interrupted = self._train(device, checkpoint)
        except StopRequestedError:
            # Nothing has been trained and nothing is left to save: no need to wait for the others.
            self._end("interrupted", self.stop.signal_name or "")
            return ExitCode.RESUMABLE
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        PULSE.enter("stop")
        torch.distributed.barrier()
        self._end("interrupted" if interrupted else "finished", self.stop.signal_name or "")
        torch.distributed.destroy_process_group()
        return ExitCode.RESUMABLE if interrupted else ExitCode.FINISHED

    def _open_log(self) -> None:
        from pretrain.training.callbacks import NullLog

        self.log = NullLog()
        if self.env.rank == 0:
            from pretrain.tracking.metrics_log import MetricsLog
            from pretrain.training.echoed_log import EchoedLog

            metrics = MetricsLog(self.run.metrics_path, self.env.attempt, fence=self._fence)
            self.log = EchoedLog(metrics, self.run.path.name, self.env.attempt)

    def _phase(self, name: str) -> None:
        self.log.write("phase", name=name)

    def _starting(self, what: str) -> None:
        """The next part of start-up; raises StopRequestedError when this rank was asked to stop meanwhile."""
        PULSE.enter("start", what)
        self.stop.check()

    def _train(self, device: Any, checkpoint: str | None) -> bool:
        from data_pipeline.loader import StepLoader
        from pretrain.checkpoint.store import CheckpointStore
        from pretrain.config.components import build_component
        from pretrain.engines.build import build_engine
        from pretrain.training.data_metrics import DataMetricsCallback
        from pretrain.training.initial_weights import begin_with_weights
        from pretrain.training.loop import Trainer
        from pretrain.training.rank_callbacks import rank_callbacks
        from pretrain.training.report import write_report
        from pretrain.training.resume import resume
        from pretrain.training.rollback import Rollback

        config = self.config
        if hasattr(config.data, "datasets"):
            self.run.check_datasets(config.data.datasets())
        sources = build_component(config.data, seed=config.run.seed)
        self.run.check_data(sources.train.fingerprint)
        if hasattr(sources.train, "bad_data"):
            sources.train.bad_data.keep(self.run.quarantine_path, self.env.rank)
        # Early: its thread opens the store while this one imports the engine, and not during the first steps.
        self._start_tracker(sources)
        self._starting("building model and engine")
        objective = build_component(config.objective)
        engine = build_engine(config, device)
        self._starting("loading a checkpoint")

        store = CheckpointStore(self.run.checkpoints_path)
        if self.env.rank == 0:
            for name in store.sweep():
                logger.info("removed %s, left by an interrupted save", name)
        events, checkpoint = self._bad_steps(store, checkpoint)
        self.state, callback_states = resume(store, checkpoint, config, engine, self.env)
        if config.train.init_from is not None and store.select(checkpoint) is None:
            self._phase("taking over initial weights")
            self._starting("taking over initial weights")
            begin_with_weights(self.run, config, engine, self.env)
        health = self._health(events)
        data_metrics = DataMetricsCallback(sources.train, lambda: getattr(self.stream, "ready_steps", 0))
        self._start_monitor(data_metrics)
        callbacks = rank_callbacks(
            self.run,
            self.tree,
            config,
            self.env,
            log=self.log,
            fence=self._fence,
            engine=engine,
            store=store,
            sources=sources,
            health=health,
            data_metrics=data_metrics,
        )
        for callback in callbacks:
            callback.load_state_dict(callback_states.get(callback.name, {}))

        def open_stream(first_batch: int, skipped: frozenset[int]) -> StepLoader:
            train = config.train
            self.stream = StepLoader(
                sources.train,
                global_batch=train.global_batch_size,
                micro_batch=train.micro_batch_size,
                dp_rank=engine.dp_rank,
                dp_size=engine.dp_size,
                start_step=first_batch,
                while_waiting=self.stop.check,
                skip=skipped,
            )
            return self.stream

        self.log.write(
            "start",
            step=self.state.step,
            steps=config.train.steps,
            world_size=self.env.world_size,
            parameters=engine.num_parameters,
            device=str(device),
            precision=config.train.precision,
            tokens_per_step=config.train.global_batch_size * getattr(config.data, "sequence_length", 1),
            resumed=self.state.step > 0,
            revision=self.run.revision(),
        )
        trainer = Trainer(
            config=config,
            engine=engine,
            objective=objective,
            open_stream=open_stream,
            state=self.state,
            stop=self.stop,
            callbacks=callbacks,
            health=health,
            rollback=Rollback(store, self.env, attempt=self.env.attempt, fence=self._fence),
        )
        self._starting("first batch")
        interrupted = trainer.run()
        PULSE.enter("stop", "closing")
        if self.env.rank == 0 and not interrupted:
            self._phase("writing the report")
            write_report(self.run, self.config)
        for source in (sources.train, sources.validation):
            if source is not None and not _is_stuck():
                source.close()
        return interrupted

    def _fence(self) -> None:
        from launchers.lease import check_attempt

        check_attempt(self.run, self.env.attempt)

    def _bad_steps(self, store: CheckpointStore, checkpoint: str | None) -> tuple[list[dict[str, Any]], str | None]:
        """Bad steps on record, and the checkpoint to continue from once what they led to has been carried out."""
        from pretrain.parallel.process import gather_objects
        from pretrain.training.health_records import read_events
        from pretrain.training.rollback import finish_rollback

        # Rank 0's view of the folder is everyone's.
        found = None
        if self.env.rank == 0:
            events = read_events(self.run.health_path)
            size, attempt = self.config.train.global_batch_size, self.env.attempt
            found = events, finish_rollback(store, checkpoint, events, size, attempt=attempt, fence=self._fence)
        return gather_objects(found)[0]

    def _health(self, events: list[dict[str, Any]]) -> HealthMonitor:
        """The judge of steps, knowing of the run's bad steps; what they left out stays left out."""
        from pretrain.training.health import HealthMonitor

        global_batch = self.config.train.global_batch_size
        skipped = [batch for event in events for batch in event["skipped"]]
        self.state.skip(batch for batch in skipped if batch * global_batch >= self.state.samples)
        return HealthMonitor(self.config.health, num_events=len(events))

    def _start_tracker(self, sources: Any) -> None:
        if self.env.rank == 0 and self.config.tracking.enabled:
            from pretrain.tracking.mlflow_tracker import MlflowTracker

            self.tracker = MlflowTracker(
                self.run.path,
                self.config.tracking,
                attempt=self.env.attempt,
                run_name=self.run.path.name,
                tags={
                    "data_fingerprint": sources.train.fingerprint,
                    "data_manifest": str(getattr(self.config.data, "fingerprint", "unknown")),
                    "world_size": str(self.env.world_size),
                },
                artifacts=[path for path in [sources.tokenizer_path] if path],
            )

    def _start_monitor(self, data_metrics: Any) -> None:
        """One rank of each node measures it; the numbers of that rank's data go with them."""
        interval_s = self.config.tracking.system_metrics_interval_s
        if self.env.local_rank == 0 and interval_s > 0:
            from pretrain.tracking.system_metrics import SystemMonitor

            path = self.run.system_metrics_path(self.env.attempt, self.env.node_rank)
            self.monitor = SystemMonitor(path, interval_s, folder=self.run.path, extra=data_metrics.numbers)

    def _end(self, status: str, message: str) -> None:
        if self.monitor is not None:
            self.monitor.close()
        if self.env.rank != 0:
            return
        try:
            if self.log is not None:
                # No step before the state is known: the history of earlier attempts must not seem rolled back.
                step = self.state.step if self.state is not None else None
                self.log.write("end", step=step, status=status, message=message)
        except Exception as error:  # A lost lease, a full disk: the original failure matters more.
            logger.error("could not record the end of the run: %s", error)
        if self.tracker is not None:
            self.tracker.close(status)


if __name__ == "__main__":
    _leave(main())
