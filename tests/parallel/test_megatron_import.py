"""The door to Megatron-Core: versions, and the CPU layer, which changes Megatron's modules and nothing else."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from typing import Any

import pytest

from pretrain.parallel.megatron_import import MegatronVersionError, check_version, import_megatron


def in_fresh_process(program: str) -> Any:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("version", ["0.15.0", "0.17.0", "1.0.0"])
def test_an_unknown_version_is_refused_before_it_is_imported(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    with pytest.raises(MegatronVersionError) as caught:
        import_megatron("cpu")
    text = str(caught.value)
    assert f"megatron-core {version} is installed" in text
    assert "expected 0.16.1" in text
    assert "pip install megatron-core==0.16.1" in text


def test_a_missing_megatron_is_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(MegatronVersionError, match="megatron-core is not installed"):
        check_version()


def test_the_cpu_layer_leaves_torch_alone() -> None:
    found = in_fresh_process("""
import json, torch
from pretrain.parallel.megatron_import import import_megatron
before = {name: id(value) for name, value in vars(torch.cuda).items()}
import_megatron("cpu")
import_megatron("cpu")  # a second engine in one process
from megatron.core.pipeline_parallel import schedules
from pretrain.parallel.megatron_cpu import adapted_places
constants = schedules.forward_backward_no_pipelining.__code__.co_consts
print(json.dumps({
    "changed": [name for name, value in vars(torch.cuda).items() if before.get(name, id(value)) != id(value)],
    "megatron asks": str(schedules.torch.cuda.current_device()),
    "same tensors": schedules.torch.Tensor is torch.Tensor,
    "left over": "cuda" in constants,
    "places": [list(place) for place in adapted_places()],
}))
""")
    assert found["changed"] == []
    assert found["megatron asks"] == "cpu"
    assert found["same tensors"]
    assert not found["left over"]
    assert ["megatron.core.pipeline_parallel.schedules", "forward_backward_no_pipelining", "cuda"] in found["places"]
    # The data-parallel wrapper of another kind, which the engine never uses, is not touched.
    assert not any(".fsdp." in module for module, _, _ in found["places"])


def test_the_cpu_layer_is_not_imported_for_cuda_and_refuses_to_work_there() -> None:
    found = in_fresh_process("""
import json, os, sys, torch
from pretrain.parallel.megatron_import import import_megatron
import_megatron("cuda")
imported = "pretrain.parallel.megatron_cpu" in sys.modules
from pretrain.parallel import megatron_cpu
torch.cuda.is_available = lambda: True
try:
    megatron_cpu.adapt()
    refusal = None
except RuntimeError as error:
    refusal = str(error)
from megatron.core.pipeline_parallel import schedules
print(json.dumps({
    "imported": imported, "refusal": refusal, "torch": schedules.torch is torch,
    "queues": os.environ["CUDA_DEVICE_MAX_CONNECTIONS"],
}))
""")
    assert not found["imported"]
    assert found["torch"]
    assert found["refusal"] is not None
    assert "where CUDA exists" in found["refusal"]
    assert found["queues"] == "1"


def test_a_version_whose_places_are_gone_is_noticed() -> None:
    text = in_fresh_process("""
import json
from pretrain.parallel import megatron_cpu
from pretrain.parallel.megatron_import import import_megatron
megatron_cpu._EXPECTED += (("megatron.core.optimizer.clip_grads", "no_such_function", "cuda"),)
try:
    import_megatron("cpu")
except RuntimeError as error:
    print(json.dumps(str(error)))
""")
    assert "no_such_function" in text
