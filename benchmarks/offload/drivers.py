"""How each kind of arm trains: a step of each, with a mark at the end of every phase."""

from __future__ import annotations

import dataclasses
import socket
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from offload.arms import BETAS, EPS, LEARNING_RATE, SUBGROUP, WEIGHT_DECAY, Arm, deepspeed_json
from offload.measure import Laps
from offload.sizes import TINY, Size, rows
from offload.work import Loss, build_model
from pretrain.config.schema import Config, DeepSpeedConfig, OffloadConfig, OptimizerConfig, RunConfig, TrainConfig


class Driver(Protocol):
    def step(self, micro_batches: list[Tensor], laps: Laps) -> Tensor | float:
        """One optimizer step; the mean loss of its tokens before the update."""
        ...

    def finish(self) -> None:
        """Wait until nothing is under way."""
        ...

    @property
    def states(self) -> Any:
        """``OffloadedStates`` of one of ours, None of others."""
        ...


def watched(arm: Arm, states: Any) -> None:
    """Let the online model follow ``states``, as training does."""
    from pretrain.optim.offload.online import Online

    if arm.offloads:
        states.watcher = Online(states)


def build_driver(
    arm: Arm, size: Size, tokens: int, micro_tokens: int, device: torch.device, seed: int, ratio: float | None
) -> Driver:
    """
    Raises:
        whatever an arm raises where it cannot run.
    """
    num_rows = rows(size, tokens)[0]
    micro_rows = rows(size, min(micro_tokens, tokens))[0]
    if arm.one_micro_batch and micro_rows != num_rows:
        raise NotImplementedError(f"{arm.label} takes a step of one micro-batch, here {num_rows // micro_rows}")
    if arm.kind == "torch":
        return TorchDriver(arm, size, device, seed)
    if arm.kind == "engine":
        return EngineDriver(arm, size, num_rows, micro_rows, device, seed)
    return DeepSpeedDriver(arm, size, num_rows, micro_rows, device, seed, ratio)


def optimizer_config(arm: Arm, size: Size) -> OptimizerConfig:
    """The platform's configuration of the optimizer. The tiny model's subgroups are small too, and where there is no
    GPU, so that nothing is computed, half of them are updated in buffers."""
    offload = dict(arm.offload)
    if arm.ours and size.name == TINY:
        offload["subgroup_size"] = offload["subgroup_size"] // (SUBGROUP // 20_000)
        if not torch.cuda.is_available():
            offload |= {name: 0.5 for name in ("fraction", "resident_fraction") if offload[name] == "auto"}
    return OptimizerConfig(
        learning_rate=LEARNING_RATE,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        offload=OffloadConfig(enabled=True, **offload) if arm.ours else OffloadConfig(),
    )


class TorchDriver:
    """``OffloadedAdamW`` in plain torch: BF16 weights and gradients."""

    def __init__(self, arm: Arm, size: Size, device: torch.device, seed: int) -> None:
        from pretrain.optim.build import parameter_groups
        from pretrain.optim.offload.optimizer import OffloadedAdamW

        self._arm, self._loss = arm, Loss()
        self._model = build_model(size, device, torch.bfloat16, seed)
        config = optimizer_config(arm, size)
        self._optimizer = OffloadedAdamW(
            parameter_groups(self._model, config),
            LEARNING_RATE,
            BETAS,
            EPS,
            offload=config.offload,
            early_gradients=config.offload.overlap,
            watch=arm.offloads,
        )

    @property
    def states(self) -> Any:
        return self._optimizer.states

    def step(self, micro_batches: list[Tensor], laps: Laps) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=micro_batches[0].device)
        targets = sum(ids.numel() - ids.shape[0] for ids in micro_batches)
        laps.begin()
        for number, ids in enumerate(micro_batches):
            loss_sum = self._loss(self._model, {"tokens": ids}).loss_sum
            laps.lap("forward")
            if number == len(micro_batches) - 1:
                self._optimizer.last_backward()
            (loss_sum / targets).backward()
            laps.lap("backward")
            total += loss_sum.detach()
        if self._arm.clip is not None:
            self._optimizer.clip_grad_norm_(self._arm.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not self._arm.prefetch:
            self._without_prefetch()
        laps.lap("update")
        return total / targets

    def finish(self) -> None:
        self._optimizer.states.synchronize()

    def _without_prefetch(self) -> None:
        """Also after the plan was made anew."""
        states = self._optimizer.states
        if states.plan.num_early:
            states.replan(dataclasses.replace(states.plan, num_early=0))


class EngineDriver:
    """Our DeepSpeed engine at ZeRO-3, as training uses it."""

    def __init__(self, arm: Arm, size: Size, num_rows: int, micro_rows: int, device: torch.device, seed: int) -> None:
        from pretrain.engines.deepspeed import DeepSpeedEngine

        join_alone(device)
        config = Config(
            run=RunConfig(name="offload", seed=seed),
            train=TrainConfig(
                global_batch_size=num_rows,
                micro_batch_size=micro_rows,
                precision="bf16",
                clip_grad_norm=arm.clip,
                activation_checkpointing="layers",
            ),
            optimizer=optimizer_config(arm, size),
            engine=DeepSpeedConfig(zero_stage=3),
        )
        self._engine = DeepSpeedEngine(build_model(size, torch.device("cpu"), torch.float32, seed), config, device)
        self._loss = Loss()
        watched(arm, self.states)

    @property
    def states(self) -> Any:
        assert self._engine.offload is not None
        return self._engine.offload.states

    def step(self, micro_batches: list[Tensor], laps: Laps) -> float:
        targets = sum(ids.numel() - ids.shape[0] for ids in micro_batches)
        laps.begin()
        result = self._engine.train_step(
            [{"tokens": ids} for ids in micro_batches], self._loss, float(targets), LEARNING_RATE
        )
        # The engine has marks of its own in the same places.
        names = {"forward": "forward", "backward": "backward", "optimizer": "update"}
        laps.told({names[phase]: seconds * 1e3 for phase, seconds in result.seconds.items()})
        return result.loss_sum / targets

    def finish(self) -> None:
        self.states.synchronize()


class DeepSpeedDriver:
    """A rival through ``deepspeed.initialize``."""

    states = None

    def __init__(
        self,
        arm: Arm,
        size: Size,
        num_rows: int,
        micro_rows: int,
        device: torch.device,
        seed: int,
        ratio: float | None,
    ) -> None:
        from pretrain.optim.build import parameter_groups

        join_alone(device)
        deepspeed = _deepspeed(device)
        deepspeed.comm.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        model = build_model(size, device, torch.bfloat16, seed)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, optimizer_config(arm, size)),
            config=deepspeed_json(arm, num_rows, micro_rows, gpu=device.type == "cuda", ratio=ratio),
            dist_init_required=False,
        )
        if arm.compile:
            self._engine.compile()
        self._loss = Loss()

    def step(self, micro_batches: list[Tensor], laps: Laps) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=micro_batches[0].device)
        targets = 0
        laps.begin()
        for number, ids in enumerate(micro_batches):
            own = ids.numel() - ids.shape[0]
            loss_sum = self._loss(self._engine, {"tokens": ids}).loss_sum
            laps.lap("forward")
            # DeepSpeed divides by the number of micro-batches itself.
            self._engine.backward(loss_sum / own)
            if number < len(micro_batches) - 1:
                self._engine.step()
            laps.lap("backward")
            total += loss_sum.detach()
            targets += own
        self._engine.step()
        laps.lap("update")
        return total / targets

    def finish(self) -> None:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()


def _deepspeed(device: torch.device) -> Any:
    """As a user has it; on the host without what it would compile at first use."""
    if device.type == "cpu":
        from pretrain.engines.deepspeed_import import import_deepspeed

        return import_deepspeed("cpu")
    import deepspeed

    return deepspeed


def join_alone(device: torch.device) -> None:
    """A default process group of this process alone."""
    from pretrain.parallel.process import ProcessEnvironment, join_process_group

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    join_process_group(ProcessEnvironment(0, 1, 0, 0, 1, "127.0.0.1", port, 1), device)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
