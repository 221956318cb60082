"""The compiled CPU update: the bits of the specification on every level, cut and number of threads; building it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from support.offload_arithmetic import HYPER, adversarial_state, assert_same_bits
from torch import Tensor

from pretrain.optim.offload import kernel_build
from pretrain.optim.offload.arithmetic import StepScalars, adamw_, join_master
from pretrain.optim.offload.cpu_adamw import LEVELS, cpu_adamw_, kernel_level

GRADIENTS = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = [None, torch.float32, torch.bfloat16, torch.float16, torch.int16]  # int16: a master of low bits
SCALARS = StepScalars.of(step=3, grad_scale=0.3, **HYPER)


@pytest.fixture(scope="module", autouse=True)
def built_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The kernel is compiled by this module itself: a stale library in the user's cache would prove nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETRAIN_KERNEL_CACHE", str(tmp_path_factory.mktemp("kernel")))
        kernel_build.forget()
        yield
    kernel_build.forget()


def levels() -> list[str]:
    """Those of the compiled kernel that this machine has."""
    best = kernel_level()
    if best not in LEVELS:
        pytest.skip("the kernel cannot be built here: there is no compiler")
    return list(LEVELS[: LEVELS.index(best) + 1])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_level_gives_the_bits_of_the_specification(gradient: torch.dtype, weight: torch.dtype | None) -> None:
    state = adversarial_state(gradient)
    expected = state.arrays(weight)
    adamw_(*expected, SCALARS)
    for level in levels():
        for threads in (1, 3):
            arrays = state.arrays(weight)
            cpu_adamw_(*arrays, SCALARS, level=level, threads=threads)
            for ours, theirs in zip(arrays, expected, strict=True):
                if ours is not None and theirs is not None:
                    assert_same_bits(ours, theirs)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    size=st.integers(0, 3000),
    gradient=st.sampled_from(GRADIENTS),
    weight=st.sampled_from(WEIGHTS),
    threads=st.integers(1, 4),
)
def test_any_cut_offset_and_number_of_threads_gives_the_same_bits(
    data: st.DataObject, size: int, gradient: torch.dtype, weight: torch.dtype | None, threads: int
) -> None:
    whole = [
        None if tensor is None else tensor[: size + 64] for tensor in adversarial_state(gradient, n=3072).arrays(weight)
    ]
    # Each array begins at an offset of its own, so that no two are aligned alike; what lies around it must not change.
    offsets = [data.draw(st.integers(0, 33)) for _ in whole]
    inside = [_shifted(tensor, offset, size) for tensor, offset in zip(whole, offsets, strict=True)]
    before = [None if buffer is None else buffer.clone() for buffer, _ in inside]
    expected = [None if tensor is None else tensor[:size].clone() for tensor in whole]
    adamw_(*expected, SCALARS)
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=4))})
    level = data.draw(st.sampled_from(levels()))
    for begin, end in itertools.pairwise(cuts):
        parts = [None if view is None else view[begin:end] for _, view in inside]
        cpu_adamw_(*parts, SCALARS, level=level, threads=threads)
    for (buffer, view), old, theirs, offset in zip(inside, before, expected, offsets, strict=True):
        if buffer is not None and view is not None and old is not None and theirs is not None:
            assert_same_bits(view, theirs)
            assert_same_bits(buffer[:offset], old[:offset])
            assert_same_bits(buffer[offset + size :], old[offset + size :])


def _shifted(tensor: Tensor | None, offset: int, size: int) -> tuple[Tensor | None, Tensor | None]:
    if tensor is None:
        return None, None
    buffer = torch.cat([tensor[:offset], tensor[:size], tensor[:20]])
    return buffer, buffer[offset : offset + size]


def test_low_bits_take_the_same_50_steps_as_a_full_master() -> None:
    state = adversarial_state(torch.bfloat16, finite=True)
    full, low = state.arrays(torch.bfloat16), state.arrays(torch.int16)
    for step in range(1, 51):
        scalars = StepScalars.of(step=step, grad_scale=0.7, **HYPER)
        gradient = (torch.sin(torch.arange(40_000) * (0.1 + step)) * 10.0 ** (step % 5 - 2)).bfloat16()
        full[3], low[3] = gradient, gradient
        cpu_adamw_(*full, scalars)
        cpu_adamw_(*low, scalars)
        assert_same_bits(low[4], full[4])
    master, square = join_master(low[0], low[4], low[2])
    for ours, theirs in zip((master, low[1], square), full[:3], strict=True):
        assert_same_bits(ours, theirs)


def test_subnormals_survive_a_caller_that_flushes_them() -> None:
    state = adversarial_state(torch.float32)
    expected, arrays = state.arrays(None), state.arrays(None)
    adamw_(*expected, SCALARS)
    level = levels()[-1]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        cpu_adamw_(*arrays, SCALARS, level=level, threads=2)
        assert torch.tensor(1e-40) * 1.0 == 0, "the caller's own mode is as it was"
    finally:
        torch.set_flush_denormal(False)
    for ours, theirs in zip(arrays[:3], expected[:3], strict=True):
        assert_same_bits(ours, theirs)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
def test_the_library_holds_no_fused_multiply_add() -> None:
    levels()
    listing = subprocess.run(["objdump", "-d", str(kernel_build.build())], capture_output=True, text=True, check=True)
    assert "sqrtps" in listing.stdout
    assert re.search(r"\b(vfn?m(add|sub)\w*|fn?m(add|sub|la|ls))\b", listing.stdout) is None


def test_a_level_or_device_that_does_not_exist_is_refused() -> None:
    arrays = adversarial_state(torch.float32, n=64).arrays(None)
    with pytest.raises(ValueError, match="level = 'sse9': expected one of scalar, avx2, avx512, torch"):
        cpu_adamw_(*arrays, SCALARS, level="sse9")
    with pytest.raises(ValueError, match="threads = 0"):
        cpu_adamw_(*arrays, SCALARS, threads=0)
    best = levels()[-1]
    if best != LEVELS[-1]:
        with pytest.raises(ValueError, match=f"this processor's highest is '{best}'"):
            cpu_adamw_(*arrays, SCALARS, level=LEVELS[-1])
    meta = [torch.zeros(4, device="meta") for _ in range(4)]
    with pytest.raises(ValueError, match="on meta: this update is for host memory"):
        cpu_adamw_(*meta, None, SCALARS)


@pytest.mark.slow
def test_agrees_with_deepspeed_cpu_adam_over_100_steps() -> None:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        reference = torch.nn.Parameter(torch.randn(4096, generator=torch.Generator().manual_seed(5)))
        values = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        optimizer = DeepSpeedCPUAdam([reference], lr=1e-3, adamw_mode=True, **values)
    except Exception as reason:
        pytest.skip(f"DeepSpeedCPUAdam cannot be built here: {reason}")
    master, exp_avg, exp_avg_sq = reference.detach().clone(), torch.zeros(4096), torch.zeros(4096)
    generator = torch.Generator().manual_seed(6)
    for step in range(1, 101):
        gradient = torch.randn(4096, generator=generator) * 10.0 ** (step % 4 - 3)
        cpu_adamw_(master, exp_avg, exp_avg_sq, gradient, None, StepScalars.of(step=step, learning_rate=1e-3, **values))
        reference.grad = gradient
        optimizer.step()
    torch.testing.assert_close(master, reference.detach(), rtol=4e-6, atol=4e-6)
    assert not torch.equal(master, reference.detach()), "another order of operations: other last bits"


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the kernel yet."""
    monkeypatch.setenv("PRETRAIN_KERNEL_CACHE", str(tmp_path / "cache"))
    kernel_build.forget()
    yield tmp_path / "cache"
    kernel_build.forget()


def compiler_script(path: Path, body: str) -> str:
    """An executable shell script that stands for the compiler."""
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo made for this test; exit 0;; esac\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("body", "reason"),
    [(None, "which is not on the path"), ("echo 'error: out of registers' >&2; exit 1", "error: out of registers")],
)
def test_without_a_kernel_the_same_bits_come_from_torch_and_the_reason_is_said_once(
    body: str | None, reason: str, fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = "no-such-compiler" if body is None else compiler_script(tmp_path / "cxx", body)
    monkeypatch.setenv("CXX", compiler)
    state = adversarial_state(torch.bfloat16)
    expected = state.arrays(torch.int16)
    adamw_(*expected, SCALARS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            arrays = state.arrays(torch.int16)
            cpu_adamw_(*arrays, SCALARS)
            for ours, theirs in zip(arrays, expected, strict=True):
                assert_same_bits(ours, theirs)
        assert kernel_level() == "torch"
    assert len(said) == 1
    assert reason in str(said[0].message)
    assert "the same bits" in str(said[0].message)
    assert not list(fresh_build.glob("**/*.so"))
    with pytest.raises(ValueError, match="the only level is 'torch'"):
        cpu_adamw_(*state.arrays(None), SCALARS, level="scalar")


def quick_compiler(tmp_path: Path) -> str:
    """g++ without optimisation, counting its calls in ``calls``."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return compiler_script(tmp_path / "cxx", f'echo x >> {tmp_path / "calls"}\nexec g++ "$@" -O0')


def test_many_processes_build_at_once(tmp_path: Path) -> None:
    program = "from pretrain.optim.offload.kernel_build import load; assert load().adamw_best_level() >= 0"
    environment = os.environ | {"CXX": quick_compiler(tmp_path), "PRETRAIN_KERNEL_CACHE": str(tmp_path / "cache")}
    starts = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [process.wait() for process in starts] == [0, 0, 0]
    (library,) = (tmp_path / "cache").iterdir()  # no leftovers of building
    compiled = len((tmp_path / "calls").read_text().splitlines())
    assert 1 <= compiled <= 3
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert len((tmp_path / "calls").read_text().splitlines()) == compiled, "what is there is loaded, not built again"
    assert library.name.startswith("adamw-")


def test_an_unusable_cache_falls_back_to_a_temporary_folder(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("CXX", quick_compiler(tmp_path))
    monkeypatch.setenv("PRETRAIN_KERNEL_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert tmp_path / "temporary" in kernel_build.build().parents
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(kernel_build.KernelUnavailable, match=r"no folder to build in .*PRETRAIN_KERNEL_CACHE"):
        kernel_build.build()


def test_a_folder_in_which_compiling_or_loading_fails_is_passed_over(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    real = quick_compiler(tmp_path)
    full = f'case "$*" in *{fresh_build}*) echo "error: No space left on device" >&2; exit 1;; esac\nexec {real} "$@"'
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "full", full))
    path = kernel_build.build()
    assert tmp_path / "second" in path.parents
    # Damaged, or where nothing may be executed: the next folder.
    path.write_bytes(b"no library")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_build.load().adamw_best_level() >= 0
    assert list((tmp_path / "temporary").glob("pretrain-kernels-*/adamw-*.so"))
    monkeypatch.setattr(kernel_build, "cache_folders", lambda: [fresh_build, path.parent])
    with pytest.raises(kernel_build.KernelUnavailable, match=r"No space left on device.*cannot be loaded"):
        kernel_build.load()


def test_another_compiler_or_source_makes_another_library(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", quick_compiler(tmp_path))
    first = kernel_build.build()
    changed = tmp_path / "adamw.cpp"
    changed.write_text(kernel_build.SOURCE.read_text() + "// changed\n")
    monkeypatch.setattr(kernel_build, "SOURCE", changed)
    assert kernel_build.build() != first
    assert first.exists()
