"""The executor on simulated devices: no race, the same bits in every order; and every planted defect is found."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.optim.offload.arithmetic import StepScalars
from pretrain.optim.offload.check import main, trial
from pretrain.optim.offload.planted import DEFECTS
from pretrain.optim.offload.schedule import Kind, Operation
from pretrain.optim.offload.shadow import Found, RaceError
from pretrain.optim.offload.simulated import SimulatedDevice

PREFETCH, FLUSH, UPDATE = Operation(Kind.PREFETCH, 0), Operation(Kind.FLUSH, 0), Operation(Kind.DEVICE_UPDATE, 0)
CPU_UPDATE, WEIGHT_UP = Operation(Kind.CPU_UPDATE, 0), Operation(Kind.WEIGHT_UP, 0)
SCALARS = StepScalars.of(step=1, learning_rate=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_no_race_and_the_bits_of_another_plan_in_any_order(seed):
    assert trial(seed).fault is None


@pytest.mark.parametrize("name", DEFECTS)
def test_every_planted_defect_is_found(name):
    found = [trial(seed, DEFECTS[name]).fault for seed in range(8)]
    # Of two kinds trials can be drawn in which nothing is under way at the wrong moment.
    assert found.count(None) <= (name in ("cpu_side_unmarked", "buffers_unawaited"))
    # The same trials without the defect: it is the defect that was found.
    assert trial(0).fault is None


@pytest.mark.parametrize(
    ("name", "sort"),
    [
        ("unawaited_update", (Found.RACE, Found.UNWRITTEN)),
        ("flush_unordered", (Found.RACE,)),
        ("prefetch_unordered", (Found.RACE, Found.UNWRITTEN)),
        ("unwritten_moments", (Found.UNWRITTEN,)),
        ("released_too_soon", (Found.RACE,)),
        ("cpu_side_unmarked", (f"{Found.RACE}: weight",)),
        ("buffers_unawaited", (f"{Found.RACE}: the release of unused memory",)),
        ("last_unflushed", ("weights", "state")),
        ("half_staged", ("weights", "ValueError")),
    ],
)
def test_defects_are_found_for_what_they_are(name, sort):
    faults = [fault for seed in range(5) if (fault := trial(seed, DEFECTS[name]).fault) is not None]
    assert faults
    assert all(fault.startswith(sort) for fault in faults)


def test_check_command_tells_what_it_did_and_fails_when_a_plant_is_not_found(capsys, monkeypatch):
    assert main(["--trials", "5"]) == 0
    assert "no race, all bits equal" in capsys.readouterr().out
    assert main(["--trials", "2", "--plant", "forward_too_soon"]) == 0
    assert "found in 2 of 2 trials" in capsys.readouterr().out
    harmless = type(DEFECTS["forward_too_soon"])("nothing", lambda training, way: True)
    monkeypatch.setitem(DEFECTS, "forward_too_soon", harmless)
    assert main(["--trials", "2", "--plant", "forward_too_soon"]) == 1
    assert "found in 0 of 2 trials" in capsys.readouterr().out


def _filled(device, num_bytes=16):
    """Memory on both sides that was written."""
    host = device.empty_host(num_bytes)
    host.zero_()
    on_device = device.empty_device(num_bytes)
    on_device.zero_()
    return host, on_device


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("ordered", [True, False])
def test_two_queues_race_unless_an_event_orders_them(seed, ordered):
    def play():
        with SimulatedDevice(seed) as device:
            host, on_device = _filled(device)
            marker = device.mark()
            up = device.run(PREFETCH, [marker], lambda: device.copy_(on_device, host))
            device.run(FLUSH, [marker, *([up] if ordered else [])], lambda: device.copy_(host, on_device))

    if ordered:
        play()
    else:
        with pytest.raises(RaceError, match="nothing orders the two") as raised:
            play()
        assert raised.value.found is Found.RACE
        assert "prefetch of 0" in str(raised.value)
        assert "flush of 0" in str(raised.value)


@pytest.mark.parametrize("seed", range(5))
def test_other_bytes_of_the_same_memory_do_not_race(seed):
    with SimulatedDevice(seed) as device:
        host, on_device = _filled(device)
        marker = device.mark()
        device.run(PREFETCH, [marker], lambda: device.copy_(on_device[:8], host[:8]))
        device.run(FLUSH, [marker], lambda: device.copy_(host[8:], on_device[8:]))


@pytest.mark.parametrize("seed", range(5))
def test_two_readers_do_not_race_and_a_writer_waits_for_both(seed):
    def play(waits_for):
        with SimulatedDevice(seed) as device:
            host, on_device = _filled(device)
            other = device.empty_host(16)
            source = device.empty_host(16)
            source.zero_()
            marker = device.mark()
            down = device.run(FLUSH, [marker], lambda: device.copy_(host, on_device))
            also = device.run(WEIGHT_UP, [marker], lambda: device.copy_(other, on_device))
            device.run(PREFETCH, [down, also][:waits_for], lambda: device.copy_(on_device, source))

    play(2)
    with pytest.raises(RaceError, match="read"):
        play(1)


@pytest.mark.parametrize("seed", range(5))
def test_the_program_itself_races_with_queues_it_did_not_wait_for(seed):
    def play(waits):
        with SimulatedDevice(seed) as device:
            host, on_device = _filled(device)
            down = device.run(FLUSH, [device.mark()], lambda: device.copy_(host, on_device))
            if waits:
                device.finish([down])
            host.add_(1)

    play(waits=True)
    with pytest.raises(RaceError, match="direct add_"):
        play(waits=False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("waits", [True, False])
def test_host_memory_goes_only_when_all_that_touched_it_is_known_to_be_over(seed, waits):
    def play():
        with SimulatedDevice(seed) as device:
            host, on_device = _filled(device)
            down = device.run(FLUSH, [device.mark()], lambda target=host: device.copy_(target, on_device))
            device.settle() if waits else device.hold([down])
            del host

    if waits:
        play()
    else:
        with pytest.raises(RaceError, match="release of unused memory"):
            play()


@pytest.mark.parametrize("seed", range(5))
def test_memory_is_not_the_callers_before_the_model_is_done_with_it(seed):
    def play(marked):
        with SimulatedDevice(seed) as device:
            early = device.mark()
            host = device.empty_host(16)
            host.zero_()
            on_device = device.empty_device(16)
            marker = device.mark() if marked else early
            device.run(PREFETCH, [marker], lambda: device.copy_(on_device, host))

    play(marked=True)
    with pytest.raises(RaceError, match="last user of"):
        play(marked=False)


@pytest.mark.parametrize("seed", range(10))
def test_released_memory_is_overwritten_and_handed_out_again_only_after_its_event(seed):
    with SimulatedDevice(seed, device_bytes=16) as device:
        host, on_device = _filled(device)
        down = device.run(FLUSH, [device.mark()], lambda: device.copy_(host, on_device))
        address = on_device.data_ptr()
        device.release_device(on_device, down)
        device.finish([down])
        again = device.empty_device(16)
        assert again.data_ptr() == address
        with pytest.raises(RaceError) as raised:
            again.add_(1)
        assert raised.value.found is Found.UNWRITTEN
    assert device.peak_bytes == 16


@pytest.mark.parametrize("seed", range(10))
def test_using_memory_after_its_release_is_found(seed):
    def play():
        with SimulatedDevice(seed) as device:
            host, on_device = _filled(device)
            down = device.run(FLUSH, [device.mark()], lambda: device.copy_(host, on_device))
            device.release_device(on_device, down)
            device.run(PREFETCH, [down], lambda: device.copy_(on_device, host))

    with pytest.raises(RaceError, match="next user of"):
        play()


def test_what_nobody_wrote_cannot_be_read_byte_by_byte():
    def play():
        with SimulatedDevice(0) as device:
            _, on_device = _filled(device)
            fresh = device.empty_host(16)
            fresh[:8].zero_()
            device.run(PREFETCH, [device.mark()], lambda: device.copy_(on_device, fresh))

    with pytest.raises(RaceError, match=r"bytes 8\.\.16") as raised:
        play()
    assert raised.value.found is Found.UNWRITTEN


def test_more_device_memory_than_there_is_cannot_be_had():
    with SimulatedDevice(0, device_bytes=32) as device:
        kept = device.empty_device(16)
        with pytest.raises(RaceError, match="33 bytes in use, the device has 32") as raised:
            device.empty_device(17)
        assert raised.value.found is Found.LIMIT
        del kept


def test_memory_that_is_dropped_is_free_again_in_the_models_order():
    with SimulatedDevice(0, device_bytes=32) as device:
        for _ in range(4):
            device.empty_device(32).zero_()
            device.settle()
            device.mark()
            device.settle()
        assert device.used_bytes == 0


def _state(memory):
    return memory[:16].view(torch.float32)


@pytest.mark.parametrize(
    ("operation", "work", "message"),
    [
        (CPU_UPDATE, lambda d, host, dev: d.copy_(host, dev), "the CPU sees neither"),
        (PREFETCH, lambda d, host, dev: d.copy_(host, host.clone()), "touches host memory"),
        (WEIGHT_UP, lambda d, host, dev: d.copy_(host[:8], host[8:]), "copies within host memory"),
        (
            UPDATE,
            lambda d, host, dev: d.adamw_(*[_state(host)] * 4, None, SCALARS, on_device=True),
            "but master is host",
        ),
        (
            CPU_UPDATE,
            lambda d, host, dev: d.adamw_(*[_state(dev)] * 4, None, SCALARS, on_device=False),
            "master is device",
        ),
        (
            UPDATE,
            lambda d, host, dev: d.adamw_(*[_state(dev)] * 4, None, SCALARS, on_device=False),
            "updates on the host",
        ),
        (UPDATE, lambda d, host, dev: host.add_(1), "touches host memory"),
        (CPU_UPDATE, lambda d, host, dev: dev.add_(1), "touches device memory"),
        (UPDATE, lambda d, host, dev: d.mark(), "gives work to queues"),
    ],
)
def test_sides_cannot_be_confused(operation, work, message):
    def play():
        with SimulatedDevice(0) as device:
            host, on_device = _filled(device)
            device.run(operation, [device.mark()], lambda: work(device, host, on_device))

    with pytest.raises(RaceError, match=message) as raised:
        play()
    assert raised.value.found is Found.SIDE


def test_seeds_run_things_in_different_orders_and_one_seed_always_in_one():
    def order(seed):
        with SimulatedDevice(seed) as device:
            others = [_filled(device, 8) for _ in range(3)]
            marker = device.mark()
            for kind, (there, here) in zip((Kind.PREFETCH, Kind.FLUSH, Kind.WEIGHT_UP), others, strict=True):
                target, source = (there, here) if kind is Kind.FLUSH else (here, there)
                device.run(Operation(kind, 0), [marker], lambda t=target, s=source: device.copy_(t, s))
            device.finish([marker])
        return tuple(name for name in device.trace if " of 0" in name)

    assert len({order(seed) for seed in range(100)}) == 6
    assert order(3) == order(3)


@pytest.mark.parametrize("seed", range(5))
def test_a_failure_is_told_by_finish_and_nothing_is_done_after_it(seed):
    done = []

    def fail():
        raise FloatingPointError("of the kernel")

    with SimulatedDevice(seed) as device:
        before = device.run(FLUSH, [], lambda: done.append("before"))
        device.finish([before])
        failed = device.run(UPDATE, [before], fail)
        waits = device.run(FLUSH, [failed], lambda: done.append("waits"))
        for event in (failed, waits):
            with pytest.raises(FloatingPointError):
                device.finish([event])
        with pytest.raises(RuntimeError, match="no more work"):
            device.run(UPDATE, [], lambda: done.append("after"))
        with pytest.raises(FloatingPointError):
            device.hold([failed])
    assert done == ["before"]


def test_the_model_sees_what_its_queue_finds_when_it_gets_there():
    seen = []
    source = random.Random(0)
    with SimulatedDevice(source.randrange(100)) as device:
        tensor = device.model_tensor(torch.tensor([1.0, 2.0]))
        device.model_reads(tensor, seen.append)
        values = torch.tensor([3.0, 4.0])
        device.model_writes(tensor, values)
        values.zero_()
        device.model_reads(tensor, seen.append)
    assert [t.tolist() for t in seen] == [[1.0, 2.0], [3.0, 4.0]]
