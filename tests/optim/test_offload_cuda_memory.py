"""Memory for a GPU and the first start of its kernel, as far as they can be seen without one."""

import ctypes
import os
from pathlib import Path

import pytest
import torch

from pretrain.optim.offload.device_memory import free_device_bytes, margin_bytes
from pretrain.optim.offload.gpu_adamw import FirstLaunch
from pretrain.optim.offload.pinned import registered_memory


def _fails():
    raise FloatingPointError("of the kernel")


def test_registered_memory_is_unregistered_once_and_while_it_is_still_there():
    calls = []

    def register(address, num_bytes):
        calls.append(("register", address, num_bytes))
        return True

    def unregister(address):
        # Reading what is unmapped would end the process.
        calls.append(("unregister", address, ctypes.string_at(address, 3)))

    memory = registered_memory(5000, register, unregister)
    assert memory.shape == (5000,)
    assert memory.data_ptr() == calls[0][1]
    assert memory.data_ptr() % 4096 == 0
    view = memory[:3]
    view.fill_(7)
    del memory
    assert len(calls) == 1
    address = view.data_ptr()
    del view
    assert calls == [("register", address, 5000), ("unregister", address, b"\x07\x07\x07")]


def test_memory_that_cannot_be_registered_is_given_back():
    def unregister(address):
        raise AssertionError("was never registered")

    assert registered_memory(100, lambda address, num_bytes: False, unregister) is None


def _flags(address):
    """Of the mapping at ``address``, as the kernel tells them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(bound, 16) for bound in words[0].split("-"))
            inside = low <= address < high
        elif inside and words[0] == "VmFlags:":
            return words[1:]
    return []


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux")
def test_a_forked_process_has_no_copy_of_registered_memory_and_does_not_unregister_it():
    calls = []
    memory = registered_memory(1 << 20, lambda address, num_bytes: True, calls.append)
    address = memory.data_ptr()
    assert "dc" in _flags(address)
    assert "dc" not in _flags(ctypes.addressof(ctypes.c_int()))
    if (child := os.fork()) == 0:
        del memory
        os._exit(len(calls))
    assert os.waitpid(child, 0)[1] == 0
    del memory
    assert calls == [address]


@pytest.mark.parametrize(
    ("stats", "expected"),
    [
        ({}, 0),
        ({"reserved": 10, "active": 4}, 6),
        # Freed, but another stream is not through with it: allocated 2, active 4.
        ({"reserved": 10, "active": 4, "allocated": 2}, 6),
        ({"reserved": 10, "active": 4, "inactive_split": 5}, 1),
    ],
)
def test_free_memory_is_what_no_stream_may_still_use(monkeypatch, stats, expected):
    told = {f"{name}_bytes.all.current": value << 30 for name, value in stats.items()}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 50 << 30))
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: told)
    assert free_device_bytes(torch.device("cuda", 0)) == (3 + expected << 30) - margin_bytes(50 << 30)


def test_a_triton_that_does_not_start_is_not_asked_again_and_said_once():
    calls = []

    def start():
        calls.append(1)
        raise RuntimeError("Failed to find C compiler")

    first = FirstLaunch()
    with pytest.warns(RuntimeWarning, match="Failed to find C compiler") as said:
        assert [first.launches(start) for _ in range(3)] == [False] * 3
    assert len(calls) == len(said) == 1


def test_a_launch_that_fails_after_others_succeeded_is_a_failure():
    first, calls = FirstLaunch(), []
    assert first.launches(lambda: calls.append(1))
    with pytest.raises(FloatingPointError):
        first.launches(_fails)
    assert calls == [1]
