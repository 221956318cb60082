"""The device on a GPU: its logic on threads in place of streams everywhere, the device itself where there is a GPU."""

import gc
import random
import threading
import traceback
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threaded_device import ThreadDevice, ThreadStreams

from pretrain.optim.offload.cuda import CudaDevice, CudaStreams
from pretrain.optim.offload.issuing import Issuer
from pretrain.optim.offload.schedule import Kind, Operation
from pretrain.optim.offload.trials import go_beside, go_inline, random_training, random_way

UP, DOWN = Operation(Kind.WEIGHT_UP, 0), Operation(Kind.GRADIENT_DOWN, 0)
DEVICE, CPU = Operation(Kind.DEVICE_UPDATE, 0), Operation(Kind.CPU_UPDATE, 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def streams():
    made = ThreadStreams()
    yield made
    made.close()


@pytest.fixture
def issuer(streams):
    return Issuer(streams)


@given(st.integers(0, 2**32))
@settings(max_examples=15, deadline=None)
def test_concurrent_threads_give_the_bits_of_one_after_the_other(seed):
    source = random.Random(seed)
    training = random_training(source)
    outcome = go_beside(training, random_way(source, training), ThreadDevice(), seed=seed)
    assert outcome.difference(go_inline(training, random_way(source, training))) is None


def test_many_steps_on_threads():
    source = random.Random(5)
    training = random_training(source, max_targets=3, max_steps=2)
    training = type(training)(**{**vars(training), "steps": training.steps * 25})
    outcome = go_beside(training, random_way(source, training), ThreadDevice(), seed=5)
    assert outcome.difference(go_inline(training, random_way(source, training))) is None


def test_giving_work_does_not_wait_for_the_cpu_but_the_work_does(streams, issuer):
    gate, log = threading.Event(), []
    on_cpu = issuer.run(CPU, [], lambda: (gate.wait(), log.append("cpu")))
    up = issuer.run(UP, [on_cpu], lambda: streams.submit(lambda: log.append("up")))
    # Without a wait of its own, but behind one that has to wait.
    second_up = issuer.run(UP, [], lambda: streams.submit(lambda: log.append("second up")))
    # On a stream that is free, after work that was not even given to its own yet.
    after = issuer.run(DEVICE, [up], lambda: streams.submit(lambda: log.append("device")))
    free = issuer.run(DOWN, [], lambda: streams.submit(lambda: log.append("down")))
    issuer.finish([free])
    assert log == ["down"]
    assert not up.issued.is_set()
    assert not second_up.issued.is_set()
    assert not after.issued.is_set()
    gate.set()
    issuer.finish([second_up, after])
    assert sorted(log[:2]) == ["cpu", "down"]
    assert log.index("cpu") < log.index("up") < log.index("second up")
    assert log.index("up") < log.index("device")


def test_work_that_need_not_wait_for_the_cpu_is_given_by_the_caller(issuer):
    givers = []
    first = issuer.run(DOWN, [issuer.mark()], lambda: givers.append(threading.current_thread()))
    second = issuer.run(DEVICE, [first], lambda: givers.append(threading.current_thread()))
    assert givers == [threading.current_thread()] * 2
    issuer.finish([second])


def test_the_cpu_works_when_its_stream_is_through_and_not_when_it_was_given(streams, issuer):
    gate, log = threading.Event(), []
    down = issuer.run(DOWN, [], lambda: streams.submit(lambda: (gate.wait(), log.append("down"))))
    on_cpu = issuer.run(CPU, [down], lambda: log.append("cpu"))
    assert down.issued.is_set()
    assert not on_cpu.issued.is_set()
    gate.set()
    issuer.finish([on_cpu])
    assert log == ["down", "cpu"]


def test_the_model_continues_after_what_it_is_held_for(streams, issuer):
    gate, log = threading.Event(), []
    down = issuer.run(DOWN, [], lambda: streams.submit(lambda: (gate.wait(), log.append("down"))))
    issuer.hold([down])
    streams.submit(lambda: log.append("model"))
    marker = issuer.mark()
    assert not log
    gate.set()
    issuer.finish([marker])
    assert log == ["down", "model"]


def _fails():
    raise FloatingPointError("of the kernel")


@pytest.mark.parametrize("failing", [CPU, UP, DEVICE])
def test_a_failure_is_told_where_it_is_waited_for_and_nothing_is_done_after_it(issuer, failing):
    done = []
    before = issuer.run(DOWN, [], lambda: done.append("before"))
    failed = issuer.run(failing, [], _fails)
    with pytest.raises(FloatingPointError, match="of the kernel") as raised:
        issuer.finish([failed])
    assert "_fails" in "".join(traceback.format_exception(raised.value))
    assert raised.value.__notes__ == [f"in the {failing.kind} of subgroup 0"]
    with pytest.raises(FloatingPointError):
        issuer.hold([failed])
    with pytest.raises(RuntimeError, match="no more work is done") as refused:
        issuer.run(DOWN, [], lambda: done.append("after"))
    assert isinstance(refused.value.__cause__, FloatingPointError)
    issuer.finish([before])
    assert done == ["before"]


def test_what_waits_for_failed_work_or_was_given_before_it_failed_is_not_done(issuer):
    gate, done = threading.Event(), []
    failed = issuer.run(CPU, [], lambda: (gate.wait(), _fails()))
    behind = issuer.run(CPU, [], lambda: done.append("behind"))
    waits = issuer.run(UP, [behind], lambda: done.append("waits"))
    gate.set()
    for event in (failed, behind, waits):
        with pytest.raises(FloatingPointError):
            issuer.finish([event])
    assert not done


def test_times_are_told_once_over_in_the_order_given(streams, issuer):
    gate = threading.Event()
    issuer.run(DEVICE, [], lambda: None)
    issuer.measure(True)
    before = issuer.mark()
    slow = issuer.run(DOWN, [before], lambda: streams.submit(gate.wait))
    on_cpu = issuer.run(CPU, [slow], lambda: None)
    other = issuer.run(DEVICE, [], lambda: None)
    issuer.finish([other, before])
    assert [time.operation for time in issuer.collect()] == [DEVICE]
    gate.set()
    issuer.finish([on_cpu])
    down, cpu = issuer.collect()
    assert [down.operation, cpu.operation] == [DOWN, CPU]
    assert issuer.time(before) <= down.start <= down.end <= cpu.start <= cpu.end
    assert issuer.collect() == []
    issuer.measure(False)
    issuer.finish([issuer.run(DEVICE, [], lambda: None)])
    assert issuer.collect() == []


@pytest.mark.parametrize("failing", [CPU, UP])
def test_work_that_failed_has_no_time(issuer, failing):
    issuer.measure(True)
    before = issuer.run(DOWN, [], lambda: None)
    failed = issuer.run(failing, [before], _fails)
    issuer.finish([before])
    with pytest.raises(FloatingPointError):
        issuer.finish([failed])
    assert [time.operation for time in issuer.collect()] == [DOWN]


def test_a_mark_that_the_model_has_not_reached_has_no_time(streams, issuer):
    gate = threading.Event()
    issuer.measure(True)
    streams.submit(gate.wait)
    marker = issuer.mark()
    assert issuer.time(marker) is None
    gate.set()
    issuer.finish([marker])
    assert issuer.time(marker) is not None


def test_released_memory_is_given_on_in_the_turn_of_the_work_that_used_it(issuer):
    gate, calls = threading.Event(), []
    on_cpu = issuer.run(CPU, [], gate.wait)
    up = issuer.run(UP, [on_cpu], lambda: calls.append("work"))
    issuer.after(up, lambda: calls.append("released"))
    assert calls == []
    gate.set()
    issuer.finish([up, issuer.run(UP, [], lambda: None)])
    assert calls == ["work", "released"]


def test_threads_keep_no_tensor_of_work_that_is_done(issuer):
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor)
    issuer.run(CPU, [], lambda kept=tensor: kept.add_(1))
    del tensor
    # The thread takes up the next work only when it has let go of the last.
    issuer.finish([issuer.run(CPU, [], lambda: None)])
    assert gone() is None


def test_every_thread_enters_before_its_first_work(streams):
    log = []
    streams.enter = lambda: log.append(("enter", threading.current_thread()))
    issuer = Issuer(streams)
    on_cpu = issuer.run(CPU, [], lambda: log.append(("work", threading.current_thread())))
    on_cpu.issued.wait()
    assert [what for what, _ in log] == ["enter", "work"]
    assert log[0][1] is log[1][1] is not threading.current_thread()


def test_a_thread_that_cannot_enter_refuses_its_work(streams):
    streams.enter = _fails
    issuer = Issuer(streams)
    with pytest.raises(FloatingPointError, match="of the kernel"):
        issuer.finish([issuer.run(CPU, [], lambda: None)])


def test_a_thread_of_cuda_enters_at_the_device_of_the_model(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    CudaStreams(torch.device("cuda", 3)).enter()
    assert chosen == [torch.device("cuda", 3)]


def test_threads_end_with_the_device(streams):
    issuer = Issuer(streams)
    serving = []
    issuer.finish([issuer.run(CPU, [], lambda: serving.append(threading.current_thread()))])
    assert serving[0].is_alive()
    del issuer
    gc.collect()
    serving[0].join(timeout=60)
    assert not serving[0].is_alive()


class _ModelOnGpu(CudaDevice):
    """The model's part of a trial on the current stream."""

    def __init__(self):
        super().__init__(torch.device("cuda"), threads=2)
        self._seen = []

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.settle()

    def model_tensor(self, values, label=""):
        return values.cuda()

    def model_writes(self, tensor, values):
        tensor.copy_(values.cuda())

    def model_reads(self, tensor, then=None):
        if then is not None:
            then(tensor.clone().cpu())

    def model_frees(self, tensor):
        # Its memory's next user on this stream.
        tensor.view(torch.uint8).fill_(255)

    def settle(self):
        torch.cuda.synchronize()


@needs_gpu
@pytest.mark.gpu
@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_a_gpu_gives_the_bits_of_the_host(seed):
    source = random.Random(seed)
    training = random_training(source, max_size=5000)
    outcome = go_beside(training, random_way(source, training), _ModelOnGpu(), seed=seed)
    assert outcome.difference(go_inline(training, random_way(source, training))) is None


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [1, 4097, 3 << 20])
def test_host_memory_on_a_gpu_is_pinned_and_survives_its_device(num_bytes):
    memory = CudaDevice(torch.device("cuda")).empty_host(num_bytes)
    assert memory.is_pinned()
    memory.copy_(torch.full((num_bytes,), 9, dtype=torch.uint8, device="cuda"), non_blocking=True)
    torch.cuda.synchronize()
    assert bool((memory == 9).all())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_copies_between_sides_convert_in_the_turn_of_their_stream(source, target, dtype, other):
    device = CudaDevice(torch.device("cuda"))
    values = torch.randn(1000).to(dtype)

    def memory(side, kind):
        empty = device.empty_device if side == "cuda" else device.empty_host
        return empty(1000 * kind.itemsize).view(kind)

    given_, taken = memory(source, dtype), memory(target, other)
    given_.copy_(values)
    event = device.run(DOWN, [device.mark()], lambda: device.copy_(taken, given_))
    device.finish([event])
    assert torch.equal(taken.cpu(), values.to(other))


@needs_gpu
@pytest.mark.gpu
def test_times_on_a_gpu_are_on_the_clock_of_the_host():
    device = CudaDevice(torch.device("cuda"), threads=1)
    device.measure(True)
    memory = device.empty_device(1 << 20)
    before = device.mark()
    down = device.run(DOWN, [before], lambda: device.copy_(memory, torch.zeros_like(memory)))
    on_cpu = device.run(CPU, [down], lambda: None)
    device.finish([on_cpu])
    first, second = device.collect()
    assert device.time(before) <= first.start <= first.end
    # The two clocks are told apart by less than this.
    assert first.end <= second.start + 1e-3
    assert second.start <= second.end
