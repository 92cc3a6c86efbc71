"""Launches recorded and replayed: right addresses, nothing kept too long, nothing recorded that cannot be."""

import ctypes
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from farfield.kernels import replay
from farfield.testing.contract import poisoned_memory

SIZE = 8  # numbers that a kernel reads


class Sum:
    """A kernel in Python: target[:SIZE] = first[:SIZE] + factor * second[:SIZE], by addresses as a launch has them."""

    __name__ = "sum"
    params = tuple(SimpleNamespace(name=name) for name in ("target", "first", "second", "factor", "CONSTANT"))
    function = packed_metadata = None

    def __init__(self):
        self.launches = 0

    def __getitem__(self, grid):
        assert grid == (3,)

        def launch(*args, CONSTANT, num_warps):
            self.run(*grid, 1, 1, *(None,) * 6, *args, CONSTANT)
            return self

        return launch

    def run(self, *args):
        grid, (target, first, second, factor, constant) = args[:3], args[9:]
        assert (grid, constant) == ((3, 1, 1), "constant")
        self.launches += 1
        target, first, second = (
            (ctypes.c_float * SIZE).from_address(_address(t) if t is not None else 0)
            for t in (target, getattr(first, "base", first), second)
        )
        for i in range(SIZE):
            target[i] = first[i] + factor * second[i]


def _address(x):
    return x if isinstance(x, int) else x.data_ptr()


class Descriptor:
    """As Triton's: a base, and what is known of it."""

    def __init__(self, base):
        self.base, self.shape = base, list(base.shape)


kernel = Sum()


def add(target, first, second, factor):
    replay.start(kernel, (3,), target, first, second, factor, CONSTANT="constant", num_warps=1)


def chain(x, y, factor):
    """out = x + factor y, and again = 2 x + 3 factor y; through memory that is given back, and through a view."""
    out = torch.empty(SIZE)
    add(out, Descriptor(x), y, factor)
    passing = x.new_empty(4 * SIZE)[SIZE : 2 * SIZE]
    add(passing, out, x, 1.0)  # 2 x + factor y
    again = torch.empty_like(out)
    add(again, passing, y[SIZE:], 2.0)
    return out, again


def numbers(seed):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(SIZE, generator=gen), torch.randn(2 * SIZE, generator=gen)


def check(found, x, y, factor=0.5):
    out, again = found
    assert torch.equal(out, x + factor * y[:SIZE])
    assert torch.equal(again, out + x + 2.0 * y[SIZE:])


def replayed(recording, *inputs):
    return replay.replay(recording, torch.device("cpu"), 0, [x.data_ptr() for x in inputs])


def test_a_replay_computes_what_was_recorded():
    x, y = numbers(0)
    found, recording = replay.record(chain, (x, y), (0.5,))
    check(found, x, y)
    assert [len(launch.holes) + len(launch.boxes) for launch in recording.launches] == [3, 3, 3]
    with poisoned_memory():
        for seed in (1, 2):
            x, y = numbers(seed)
            before = kernel.launches
            check(replayed(recording, x, y), x, y)
            assert kernel.launches == before + 3


def test_memory_that_is_given_back_is_used_again():
    def twice(x):
        for _ in range(32):
            passing = torch.empty(1 << 16)
            add(passing, x, x, 1.0)
            del passing
        out = torch.empty(SIZE)
        add(out, x, x, 2.0)
        return out

    x, _ = numbers(0)
    found, recording = replay.record(twice, (x,))
    assert torch.equal(found, 3 * x)
    assert isinstance(replayed(recording, x), torch.Tensor)
    # the allocator gives the same place out again; at worst, a few
    assert recording.scratch < 16 * (4 << 16)


def test_one_tensor_given_twice_is_two_inputs():
    x, y = numbers(0)
    _, recording = replay.record(chain, (y[:SIZE], y), (0.5,))
    check(replayed(recording, x, y), x, y)


def test_what_else_is_done_is_refused():
    def adds(x):
        return x + x

    def gathers(x):
        out = torch.empty(SIZE)
        replay.start(kernel, (3,), out, x, (x, x), 1.0, CONSTANT="constant", num_warps=1)
        return out

    def elsewhere(x, y):
        out = torch.empty(SIZE)
        add(out, x, y, 1.0)
        return out

    x, y = numbers(0)
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor cannot be recorded"):
        replay.record(adds, (x,))
    with mock.patch.object(Sum, "run"), pytest.raises(RuntimeError, match="tensors in tuples"):
        replay.record(gathers, (x,))
    with pytest.raises(RuntimeError, match="neither an input nor a constant"):
        replay.record(elsewhere, (x,), (y,))
    for returned in (lambda x: x, lambda x: torch.empty(4, 4).T, lambda x: torch.empty(4)[1:]):
        with pytest.raises(RuntimeError, match="must return"):
            replay.record(returned, (x,))
    # nothing is left behind
    check(replay.record(chain, (x, y), (0.5,))[0], x, y)


def made(size):
    return 2 * torch.arange(float(size))


def offset(x, y, factor):
    """x + factor * what is made once."""
    out = torch.empty_like(x)
    add(out, x, replay.constant(made, SIZE), factor)
    return out


def test_constants_are_made_once_and_kept():
    x, y = numbers(0)
    with mock.patch(f"{__name__}.made", wraps=made) as makes:
        for seed in range(3):
            x, y = numbers(seed)
            if not seed:
                found, recording = replay.record(offset, (x, y), (0.5,))
            else:
                found = replayed(recording, x, y)
            assert torch.equal(found, x + torch.arange(SIZE))
            torch.full((SIZE,), float("nan"))  # what was given back would be here
        assert makes.call_count == 1
    # outside of a recording it is just called
    assert torch.equal(offset(x, y, 0.5), x + torch.arange(SIZE))


@pytest.fixture
def cuda(monkeypatch):
    """As much of a device as `Recorded` asks for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(replay, "_stream", lambda device: 0)
    with mock.patch.object(replay, "record", wraps=replay.record) as record:
        yield record


def test_a_call_is_recorded_once_a_stream(cuda, monkeypatch):
    run = replay.Recorded(chain, 0.5)
    for stream in range(3 * replay.STREAMS):
        monkeypatch.setattr(replay, "_stream", lambda device, stream=stream: stream)
        for seed in range(3):
            x, y = numbers(seed)
            check(run(x, y), x, y)
        assert cuda.call_count == stream + 1
        assert len(run.recordings) <= replay.STREAMS


def test_other_alignments_go_the_ordinary_way(cuda):
    x, y = numbers(0)
    run = replay.Recorded(chain, 0.5)
    shifted = torch.cat([y[:1], y])[1:]
    assert shifted.data_ptr() % replay.ALIGNED
    check(run(x, shifted), x, y)
    assert not cuda.called
    check(run(x, y), x, y)
    with mock.patch.object(replay, "replay") as again:
        check(run(x, shifted), x, y)
    assert not again.called


@pytest.mark.parametrize("why", ["a profiler listens", "a graph is captured"])
def test_profilers_and_captures_see_ordinary_launches(cuda, monkeypatch, why):
    x, y = numbers(0)
    run, new = replay.Recorded(offset, 0.5), replay.Recorded(offset, 0.5)
    run(x, y)
    if why == "a profiler listens":
        monkeypatch.setattr(replay, "_heard", lambda: True)
    else:
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with mock.patch.object(replay, "replay") as again, mock.patch(f"{__name__}.made", wraps=made) as makes:
        for one in (run, new):
            assert torch.equal(one(x, y), x + torch.arange(SIZE))
    assert not again.called
    # neither is a kept constant read, nor is one kept
    assert makes.call_count == 2
    assert not new.recordings


def test_another_device_is_made_the_current_one(cuda, monkeypatch):
    entered = []

    class Device:
        def __init__(self, device):
            entered.append(device)

        def __enter__(self):
            monkeypatch.setattr(torch.cuda, "current_device", lambda: None)

        def __exit__(self, *error):
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Device)
    x, y = numbers(0)
    run = replay.Recorded(chain, 0.5)
    for _ in range(2):
        check(run(x, y), x, y)
    assert entered == [x.device, x.device]


def test_hooks_of_profilers_are_seen():
    from triton import knobs

    assert not replay._heard()
    hooks = knobs.runtime.launch_enter_hook

    def listen(metadata):
        pass

    hooks.add(listen)
    try:
        assert replay._heard()
    finally:
        hooks.remove(listen)
    assert not replay._heard()


class Raw:
    """In place of Triton's launcher in C."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append([list(x) if i + 1 == len(args) and isinstance(x, tuple) else x for i, x in enumerate(args)])


class Box(Descriptor):
    """Of an address alone."""

    def __init__(self, base):
        self.base, self.shape, self.strides, self.padding = base, [5, 64], [64, 1], "zero"


SIGNATURE = {
    "a": "tensordesc<bf16[1, 64]>",
    "x": "*fp32",
    "n": "i32",
    "b": "tensordesc<bf16[1, 64]>",
    "t": ("i32", "i32"),
}


def loaded(monkeypatch, signature, known):
    """A kernel as Triton has it once it is launched, whose launcher in C is in Python."""
    from triton.backends.nvidia import driver

    def encoded(arg, metadata):
        return [("encoded", arg.base.data_ptr(), metadata), *arg.shape, *arg.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encoded)
    raw, run = Raw(), object.__new__(driver.CudaLauncher)
    about = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "arg_annotations": "annotations"}
    about |= {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
    vars(run).update(about, kernel_signature="signature", launch=driver.wrap_handle_tensordesc(raw, signature, known))
    metadata = SimpleNamespace(tensordesc_meta=known)
    return SimpleNamespace(run=run, function=77, packed_metadata=(4, 1, 0), metadata=metadata), raw


def launch_of(kernel):
    """Arguments a, x, n, b, t: descriptors of inputs 0 and 1, and input 0 itself."""
    about = {name: x for name, x in vars(Box(None)).items() if name != "base"}
    boxes = [replay.Box(place, slot, 32, Box, about, torch.bfloat16) for place, slot in ((0, 0), (3, 1))]
    return replay.Launch(kernel, (2, 1, 1), [None, 0, 9, None, (3, 4)], [replay.Hole(1, 0, 16)], boxes)


def test_the_launcher_is_called_as_triton_calls_it(monkeypatch):
    kernel, raw = loaded(monkeypatch, SIGNATURE, ["first", "second"])
    launch = launch_of(kernel)
    for first, second in ((1 << 20, 1 << 21), (1 << 22, 1 << 21)):
        launch(123, [first, second])
        boxes = [Box(replay.Address(x + 32, torch.bfloat16)) for x in (first, second)]
        values = boxes[0], first + 16, 9, boxes[1], (3, 4)
        kernel.run(2, 1, 1, 123, kernel.function, kernel.packed_metadata, None, None, None, *values)
    assert launch.launch is raw
    assert raw.calls[0] == raw.calls[1] != raw.calls[2] == raw.calls[3]


def test_launches_without_descriptors_are_as_tritons_too(monkeypatch):
    kernel, raw = loaded(monkeypatch, {"x": "*fp32", "t": ("i32", "i32")}, None)
    replay.Launch(kernel, (2, 3, 1), [0, (3, 4)], [replay.Hole(0, 0, 16)], [])(123, [1 << 20])
    kernel.run(2, 3, 1, 123, kernel.function, kernel.packed_metadata, None, None, None, (1 << 20) + 16, (3, 4))
    assert raw.calls[0] == raw.calls[1]


def test_a_descriptor_is_encoded_once_an_address(monkeypatch):
    kernel, _ = loaded(monkeypatch, SIGNATURE, ["first", "second"])
    launch = launch_of(kernel)
    for i in range(3 * replay.ADDRESSES):
        for _ in range(2):
            launch(0, [i << 10, 1 << 40])
    assert all(len(box.encoded) <= replay.ADDRESSES for box in launch.boxes)
    assert launch.boxes[1].encoded[(1 << 40) + 32] == ("encoded", (1 << 40) + 32, "second")


@pytest.mark.parametrize("why", ["another version", "scratch memory", "another launcher"])
def test_what_is_not_known_is_launched_by_run(monkeypatch, why):
    import triton

    kernel, _ = loaded(monkeypatch, SIGNATURE, ["first", "second"])
    if why == "another version":
        monkeypatch.setattr(triton, "__version__", "3.8.0")
    elif why == "scratch memory":
        kernel.run.global_scratch_size = 128
    else:
        kernel.run = mock.Mock()
    launch = launch_of(kernel)
    if why == "scratch memory":
        launch._prepare()
    else:
        launch(123, [1 << 20, 1 << 21])
    assert launch.launch is kernel.run
    if why == "another launcher":
        *before, a, x, n, b, t = kernel.run.call_args.args
        assert before == [2, 1, 1, 123, 77, (4, 1, 0), None, None, None]
        assert (a.base.data_ptr(), x, n, b.base.data_ptr(), t) == (
            (1 << 20) + 32,
            (1 << 20) + 16,
            9,
            (1 << 21) + 32,
            (3, 4),
        )
