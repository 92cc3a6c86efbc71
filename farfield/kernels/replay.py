"""Launches recorded once and replayed past Triton's binder, which costs the host more than short kernels the GPU.

A function that allocates, takes views and launches kernels, and does nothing else with tensors, does the same whenever
shapes, strides, dtypes, device and options are the same: only addresses differ. Its first call is recorded: each launch
with the kernel that Triton chose and with its arguments, in which an address is an input, an output or scratch memory
and an offset, or a constant: what `constant` made, which is the same at every call. Further calls allocate the outputs
and one piece of scratch memory and start the same kernels.

What Triton would look at again is looked at here: a recorded kernel holds for addresses that 16 divides, so other
inputs go the ordinary way. So does a call that a profiler listens to, or that a CUDA graph captures: the graph would go
on reading constants that are given back here, and what is made during a capture is made when the graph runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs

from farfield.kernels import entrance
from farfield.ops.eager import thread

STREAMS = 4  # that a function's recordings are kept for
ADDRESSES = 64  # that a descriptor's encodings are kept for
ALIGNED = 16  # bytes; what Triton compiles for

_aten: Any = torch.ops.aten
_EMPTY = (
    _aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
)  # fmt: skip
_local = threading.local()
_lock = threading.Lock()


class Refused(RuntimeError):
    """What a function does cannot be recorded."""


class Address:
    """Memory of a dtype as Triton takes it in place of a tensor."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Hole(NamedTuple):
    """Argument number `place` is `offset` bytes into memory `slot`: inputs, outputs, then scratch memory."""

    place: int
    slot: int
    offset: int


class Box:
    """The same for the address in a tensor descriptor, of which everything else is in `about`."""

    __slots__ = ("about", "dtype", "encode", "encoded", "kind", "offset", "place", "slot")

    def __init__(self, place: int, slot: int, offset: int, kind: type, about: dict[str, Any], dtype: torch.dtype):
        self.place, self.slot, self.offset = place, slot, offset
        self.kind, self.about, self.dtype = kind, about, dtype
        self.encode: Callable[[Any], Any] | None = None
        self.encoded: dict[int, Any] = {}

    def at(self, address: int) -> Any:
        """The descriptor of memory at an address, encoded if it is known how."""
        if self.encode is None:
            return self._made(address)
        found = self.encoded.get(address)
        if found is None:
            # allocators hand out few addresses in turn
            if len(self.encoded) >= ADDRESSES:
                self.encoded.clear()
            found = self.encoded[address] = self.encode(self._made(address))
        return found

    def _made(self, address: int) -> Any:
        made = object.__new__(self.kind)
        made.__dict__.update(self.about, base=Address(address, self.dtype))
        return made


class Launch:
    """One launch: Triton's compiled kernel, and its arguments with holes."""

    __slots__ = ("before", "boxes", "grid", "holes", "kernel", "launch", "packed", "values")

    def __init__(self, kernel: Any, grid: tuple[int, int, int], values: list[Any], holes: list[Hole], boxes: list[Box]):
        self.kernel, self.grid, self.values, self.holes, self.boxes = kernel, grid, values, holes, boxes
        self.launch: Callable[..., Any] | None = None
        self.before: tuple[Any, ...] = ()
        self.packed = False

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        if self.launch is None:
            self._prepare()
        values = self.values.copy()
        for place, slot, offset in self.holes:
            values[place] = addresses[slot] + offset
        for box in self.boxes:
            values[box.place] = box.at(addresses[box.slot] + box.offset)
        if self.packed:
            self.launch(*self.grid, stream, *self.before, values)  # pyright: ignore[reportOptionalCall]
        else:
            self.launch(*self.grid, stream, *self.before, *values)  # pyright: ignore[reportOptionalCall]

    def _prepare(self) -> None:
        """What every launch has in common, once the kernel is loaded."""
        with _lock:
            if self.launch is None:
                self._enter()

    def _enter(self) -> None:
        found = entrance.of(self.kernel)
        if found is None:
            self.before = self.kernel.function, self.kernel.packed_metadata, None, None, None
            self.launch = self.kernel.run
            return
        # the shape and strides of a descriptor follow its encoding
        for box, known in zip(reversed(self.boxes), reversed(found.known), strict=True):
            more = [*box.about["shape"], *box.about["strides"]]
            self.values[box.place + 1 : box.place + 1] = more
            self.holes = [h._replace(place=h.place + len(more) * (h.place > box.place)) for h in self.holes]
            for other in self.boxes:
                other.place += len(more) * (other.place > box.place)
            box.encode = partial(_encode, found.encode, known)
        self.before, self.packed, self.launch = found.before, found.packed, found.launch


def _encode(encode: Callable[[Any, Any], Any], known: Any, made: Any) -> Any:
    return encode(made, known)


class Recording(NamedTuple):
    """What a call did.

    Args:
        outputs: shapes and dtypes.
        scratch: bytes.
        single: the function returns a tensor, not a tuple of them.
        constants: tensors whose addresses stand in the launches.
    """

    launches: list[Launch]
    outputs: list[tuple[torch.Size, torch.dtype]]
    scratch: int
    single: bool
    constants: list[Tensor]


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options), for functions that may be recorded."""
    made = kernel[grid](*args, **options)
    recorder = getattr(_local, "recorder", None)
    if recorder is not None and not recorder.paused:
        recorder.add(kernel, grid, made, args, options)


def constant(make: Callable[..., Any], *given: Any) -> Any:
    """make(*given), tensors or None, which a recording keeps instead of making them again.

    It must follow from what the recording is for, and nobody may write to it.
    """
    recorder = getattr(_local, "recorder", None)
    return make(*given) if recorder is None else recorder.constant(make, given)


class Recorded:
    """A function of tensors on one CUDA device, recorded at its first call on a stream and replayed afterwards.

    It is for one shape, stride and dtype of each input.

    Args:
        function: launches through `start`, allocates, takes views; returns contiguous tensors, or one.
        options: what it takes behind the tensors.

    Raises:
        Refused: at the first call, `function` does something else with tensors.
    """

    __slots__ = ("function", "options", "recordings")

    def __init__(self, function: Callable[..., Any], *options: Any):
        self.function, self.options = function, options
        # constants that one stream has made are not there yet for another
        self.recordings: dict[int, Recording] = {}

    def __call__(self, *inputs: Tensor) -> Any:
        device = inputs[0].device
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*inputs)
        addresses = [x.data_ptr() for x in inputs]
        bits = 0
        for at in addresses:
            bits |= at
        # a capture is made once
        if bits % ALIGNED or _heard() or torch.cuda.is_current_stream_capturing():
            return self.function(*inputs, *self.options)
        stream = _stream(device)
        recording = self.recordings.get(stream)
        if recording is not None:
            return replay(recording, device, stream, addresses)
        found, recording = record(self.function, inputs, self.options)
        if len(self.recordings) >= STREAMS:
            self.recordings.clear()
        self.recordings[stream] = recording
        return found


def _stream(device: torch.device) -> int:
    """The handle of the stream that launches go to."""
    return torch._C._cuda_getCurrentRawStream(device.index)


def _heard() -> bool:
    """Whether a profiler wants to know of every launch."""
    hook: Any = knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def replay(recording: Recording, device: torch.device, stream: int, addresses: list[int]) -> Any:
    """The recorded launches on inputs at these addresses."""
    outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in recording.outputs]
    addresses += [x.data_ptr() for x in outputs]
    if recording.scratch:
        scratch = torch.empty(recording.scratch, dtype=torch.uint8, device=device)
        addresses.append(scratch.data_ptr())
    for launch in recording.launches:
        launch(stream, addresses)
    return outputs[0] if recording.single else tuple(outputs)


def record(
    function: Callable[..., Any], inputs: Sequence[Tensor], options: Sequence[Any] = ()
) -> tuple[Any, Recording]:
    """The function's result, and the recording of the call."""
    spans = sorted((x.data_ptr(), x.data_ptr() + _extent(x)) for x in inputs)
    if any(a[1] > b[0] for a, b in pairwise(spans)):
        # one input is in the other: which of the two an address belongs to could not be told
        inputs = [_copied(x) for x in inputs]
    recorder = _Recorder(inputs)
    if getattr(_local, "recorder", None) is not None:
        raise RuntimeError("a recorded function must not record another one")
    _local.recorder = recorder
    thread.recording = True
    try:
        with recorder:
            found = function(*inputs, *options)
    finally:
        _local.recorder = None
        thread.recording = False
    return found, recorder.done(found)


class _Memory(NamedTuple):
    """Bytes first .. last - 1; tensors that died may have had the same."""

    first: int
    last: int


class _Recorder(TorchDispatchMode):
    """Sees every allocation and every launch of a function."""

    def __init__(self, inputs: Sequence[Tensor]):
        super().__init__()
        self.inputs = [_Memory(x.data_ptr(), x.data_ptr() + _extent(x)) for x in inputs]
        self.made: list[_Memory] = []
        self.constants: list[Tensor] = []
        self.paused = False
        # launches; (place, allocation or -1 - input, offset) stands where a hole will be
        self.seen: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if self.paused:
            return found
        if func in _EMPTY:
            at = found.untyped_storage().data_ptr()
            self.made.append(_Memory(at, at + found.untyped_storage().nbytes()))
        elif not (func.is_view or func is _aten.detach.default):
            raise Refused(f"{func} cannot be recorded: only allocations, views and launches can")
        return found

    def constant(self, make: Callable[..., Any], given: Sequence[Any]) -> Any:
        self.paused = True
        try:
            found = make(*given)
        finally:
            self.paused = False
        self.constants += [x for x in tree_leaves(found) if isinstance(x, Tensor)]
        return found

    def add(self, kernel: Any, grid: tuple[int, ...], made: Any, args: Sequence[Any], options: dict[str, Any]) -> None:
        made = made.result() if hasattr(made, "result") else made
        names = [parameter.name for parameter in kernel.params]
        values = [*args, *(options[name] for name in names[len(args) :])]
        holes, boxes = [], []
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                values[place] = value.data_ptr()
                where = self._find(value.data_ptr())
                if where is not None:
                    holes.append(Hole(place, *where))
            elif isinstance(base := getattr(value, "base", None), Tensor):
                where = self._find(base.data_ptr())
                if where is None:
                    raise Refused(f"{kernel.__name__}: a descriptor of a constant cannot be recorded")
                values[place] = None
                about = {name: x for name, x in vars(value).items() if name != "base"}
                boxes.append(Box(place, *where, type(value), about, base.dtype))
            elif isinstance(value, tuple) and any(isinstance(x, Tensor) for x in value):
                raise Refused(f"{kernel.__name__}: tensors in tuples cannot be recorded")
        grid_3 = grid[0], *grid[1:], *((1,) * (3 - len(grid)))
        self.seen.append(Launch(made, grid_3, values, holes, boxes))

    def done(self, found: Any) -> Recording:
        """The recording, once it is known which allocations are outputs."""
        outputs: list[Tensor] = [found] if isinstance(found, Tensor) else list(found)
        slots: dict[int, tuple[int, int]] = {-1 - i: (i, 0) for i in range(len(self.inputs))}
        for j, x in enumerate(outputs):
            if not x.is_contiguous():
                raise Refused("a recorded function must return contiguous tensors")
            at = x.untyped_storage().data_ptr()
            own = any(memory.first == at for memory in self.made)
            if not own or x.storage_offset() or x.untyped_storage().nbytes() != x.nbytes:
                raise Refused("a recorded function must return tensors that it has allocated")
            owner = max(i for i, memory in enumerate(self.made) if memory.first == at)
            slots[owner] = len(self.inputs) + j, 0
        # what shared memory one after the other shares it again
        regions: list[list[int]] = []
        rest = [i for i, memory in enumerate(self.made) if i not in slots and memory.last > memory.first]
        for i in sorted(rest, key=lambda i: self.made[i].first):
            first, last = self.made[i]
            if regions and first < regions[-1][1]:
                regions[-1][1] = max(regions[-1][1], last)
            else:
                regions.append([first, last])
        scratch, at = len(self.inputs) + len(outputs), 0
        starts = []
        for first, last in regions:
            # as far from a multiple of 512 as it was
            at = -(-at // 512) * 512 + first % 512
            starts.append(at)
            at += last - first
        for i in rest:
            memory = self.made[i]
            n = max(n for n, region in enumerate(regions) if region[0] <= memory.first)
            slots[i] = scratch, starts[n] + memory.first - regions[n][0]
        for launch in self.seen:
            launch.holes = [Hole(place, slots[i][0], slots[i][1] + offset) for place, i, offset in launch.holes]
            for box in launch.boxes:
                box.slot, start = slots[box.slot]
                box.offset += start
        about = [(x.shape, x.dtype) for x in outputs]
        return Recording(self.seen, about, at, isinstance(found, Tensor), self.constants)

    def _find(self, address: int) -> tuple[int, int] | None:
        """Which memory an address is in, the latest that was there, and how far from its start; None for a constant.

        Nothing is at 0, and nothing is read from there.
        """
        if not address or any(x.data_ptr() <= address < x.data_ptr() + _extent(x) for x in self.constants):
            return None
        for i in reversed(range(len(self.made))):
            if self.made[i].first <= address < self.made[i].last:
                return i, address - self.made[i].first
        for i, memory in enumerate(self.inputs):
            if memory.first <= address < memory.last:
                return -1 - i, address - memory.first
        raise Refused("a recorded launch reads what is neither an input nor a constant nor allocated here")


def _copied(x: Tensor) -> Tensor:
    """A copy with the same strides, which may be 0: of all that lies between the first and the last element."""
    flat = x.as_strided((_extent(x) // x.element_size(),), (1,))
    return flat.clone().as_strided(x.shape, x.stride(), 0)


def _extent(x: Tensor) -> int:
    """Bytes from the first to the last element."""
    if not x.numel():
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()
