"""Probing this host: finite plausible numbers, kept in a file with what they belong to."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from pretrain.optim.offload import probe as module
from pretrain.optim.offload.constants import Constants
from pretrain.optim.offload.constants_file import read_constants
from pretrain.optim.offload.probe import probe, save_constants

CPU = torch.device("cpu")
KNOWN = Constants(50e9, 48e9, 44e9, 43e9, 0.85, 2.2e9, 1.7e9, 8e10, 1.5e-5)


@pytest.fixture(scope="module")
def measured() -> Constants:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LARGEST_COPY", 8 << 20)
        patch.setattr(module, "LARGEST_UPDATE", 1 << 18)
        return probe(CPU, seconds=0.05, threads=1)


def test_a_host_has_finite_rates(measured: Constants) -> None:
    for name, value in dataclasses.asdict(measured).items():
        if name != "latency":
            assert 0 < value < math.inf, name
    # Any machine moves more than 10 MB/s and less than 10 TB/s, and updates 100 thousand elements in a second.
    assert 1e7 < measured.h2d < 1e13
    assert 1e5 < measured.cpu_adam < 1e12


def test_nothing_is_faster_for_company(measured: Constants) -> None:
    assert measured.h2d_duplex <= measured.h2d
    assert measured.d2h_duplex <= measured.d2h
    assert measured.cpu_adam_with_link <= measured.cpu_adam
    assert 0 < measured.link_with_cpu <= 1


def test_a_host_s_own_update_stands_for_the_device_s(measured: Constants) -> None:
    assert measured.gpu_adam == measured.cpu_adam
    assert measured.latency == 0


def test_parts_of_a_piece_of_work_count() -> None:
    assert module._done_by([1.0, 2.0, 4.0], 4.0) == 3.0
    assert module._done_by([1.0, 2.0, 4.0], 3.0) == 2.5
    assert module._done_by([2.0], 0.5) == 0.25


def test_constants_survive_a_file_and_say_where_they_are_from(tmp_path: Path) -> None:
    path = tmp_path / "new" / "constants.json"
    save_constants(path, KNOWN, CPU, threads=3)
    assert read_constants(path)[0] == KNOWN
    about = json.loads(path.read_text())["measured"]
    assert about["threads"] == 3
    assert about["torch"] == torch.__version__
    assert "host to host" in about["device"]  # no link was measured, and the file says so
    assert about["date"].startswith("20")
    assert about["host"]
    assert about["cpu_kernel"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("not JSON", "no JSON"),
        ("[]", "holds none"),
        ('{"constants": {"h2d": "fast"}}', "h2d is 'fast'"),
        ('{"constants": {"h2d": 1.0}}', "expected"),
        (json.dumps({"constants": {**dataclasses.asdict(KNOWN), "d2h": 0.0}}), "d2h is 0.0"),
        (json.dumps({"constants": {**dataclasses.asdict(KNOWN), "d2h": math.inf}}), "d2h is inf"),
    ],
)
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "constants.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        read_constants(path)
    assert str(path) in str(caught.value)
    assert "pretrain offload probe" in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU's link")
def test_a_gpu_has_finite_rates() -> None:
    found = probe(torch.device("cuda"), seconds=1.0)
    for name, value in dataclasses.asdict(found).items():
        assert 0 < value < math.inf, name
    assert found.gpu_adam > found.cpu_adam
