"""Memory nobody may touch: tensors between bands of poison, and in Triton's interpreter a look at
every address a kernel uses.

A band shows a write, and a read that leaks into a result; the interpreter's addresses show every
read. Programs of a launch run one after the other there, so what they would do to one another on a
device shows in the addresses alone."""

import functools
from contextlib import contextmanager
from types import SimpleNamespace

import torch

# a NaN with bits no arithmetic makes, and a number that is no class
POISON = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FC5A5A5),
    torch.float64: (torch.int64, 0x7FF85A5A5A5A5A5A),
    torch.int32: (torch.int32, 0x5A5A5A5A),
    torch.int64: (torch.int64, 0x5A5A5A5A5A5A5A5A),
}
# elements on either side of a tensor
BAND = 256


class Guards:
    """Tensors placed among poison. Within ``allocations`` what torch.empty and its kin return lies
    there too."""

    def __init__(self, poison=True):
        self.poison = poison
        self.held = []

    def place(self, t, lead=0, gap=0, step=1):
        """The numbers of ``t``, ``lead`` elements past a boundary of 64 bytes, rows ``gap``
        elements apart, every ``step``-th element."""
        strides, room = [], step
        for i, size in enumerate(reversed(t.shape)):
            strides.insert(0, room)
            room = room * size + (gap if i == 0 else 0)
        return self._between_bands(t, strides, lead)

    def _between_bands(self, t, strides, lead):
        reach = (
            sum((size - 1) * stride for size, stride in zip(t.shape, strides, strict=True)) + 1
            if t.numel()
            else 0
        )
        bits, poison = POISON[t.dtype]
        memory = torch.full(
            (BAND + lead + reach + BAND,), poison if self.poison else 0, dtype=bits, device=t.device
        )
        where = (t.shape, strides, BAND + lead)
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside.as_strided(*where).fill_(False)
        self.held.append((memory, outside, memory[outside], BAND + lead))
        placed = memory.view(t.dtype).as_strided(*where)
        return placed.copy_(t.detach())

    @contextmanager
    def allocations(self):
        def between_bands(make):
            @functools.wraps(make)
            def made(*args, **kwargs):
                t = make(*args, **kwargs)
                return (
                    t if t.numel() == 0 or t.dtype not in POISON else self._fresh(t, make.__name__)
                )

            return made

        places = [(torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like")]
        places += [(torch.Tensor, name) for name in ("new_empty", "new_zeros")]
        before = [getattr(owner, name) for owner, name in places]
        for (owner, name), make in zip(places, before, strict=True):
            setattr(owner, name, between_bands(make))
        try:
            yield self
        finally:
            for (owner, name), make in zip(places, before, strict=True):
                setattr(owner, name, make)

    def _fresh(self, t, name):
        placed = self._between_bands(t, t.stride(), 0)
        if "empty" in name:
            bits, poison = POISON[t.dtype]
            placed.view(bits).fill_(poison)
        return placed

    def check(self):
        """Raises if a byte between or beside the tensors has changed."""
        for memory, outside, before, first in self.held:
            changed = (memory[outside] != before).nonzero()[:, 0]
            if len(changed):
                at = int(outside.nonzero()[changed[0], 0]) - first
                raise AssertionError(
                    f"{len(changed)} elements beside a tensor have changed, the first at {at} from where it starts"
                )


class Watched:
    """What a launch in the interpreter may use, and what its programs have used."""

    def __init__(self, tensors):
        import numpy as np

        self.np = np
        elements = [self._bytes_of(t) for t in tensors if t.numel()]
        self.allowed = np.unique(np.concatenate(elements)) if elements else np.empty(0, np.uint64)
        self.program, self.accesses = 0, {"read": [], "written": []}

    def _bytes_of(self, t):
        np = self.np
        at = np.zeros((), np.int64)
        for size, stride in zip(t.shape, t.stride(), strict=True):
            at = at[..., None] + np.arange(size) * stride
        return self.wide(t.data_ptr() + at.reshape(-1) * t.element_size(), t.element_size())

    def wide(self, addresses, itemsize):
        """Every byte of elements."""
        np = self.np
        return (
            addresses.astype(np.uint64)[:, None] + np.arange(itemsize, dtype=np.uint64)
        ).reshape(-1)

    def use(self, how, pointers, mask, itemsize, *, shared=False):
        np = self.np
        pointers, mask = np.broadcast_arrays(pointers, mask)
        mine = self.wide(np.unique(pointers[mask != 0]), itemsize)
        if not len(mine):
            return
        at = np.minimum(np.searchsorted(self.allowed, mine), max(len(self.allowed) - 1, 0))
        foreign = mine[self.allowed[at] != mine] if len(self.allowed) else mine
        if len(foreign):
            beside = int(
                min((int(foreign[0]) - int(end) for end in self.allowed[[0, -1]]), key=abs)
            )
            raise AssertionError(
                f"{len(foreign)} bytes {how} that are no element of any argument, {beside} bytes from their first or last"
            )
        if not shared:
            self.accesses[how].append((mine, self.program))

    def races(self):
        """Bytes that one program writes and another reads or writes."""
        np = self.np

        def pairs(how):
            made = [
                np.stack([mine, np.full(len(mine), program, np.uint64)])
                for mine, program in self.accesses[how]
            ]
            return (
                np.unique(np.concatenate(made, 1), axis=1) if made else np.empty((2, 0), np.uint64)
            )

        written, read = pairs("written"), pairs("read")
        twice = len(written[0]) - len(np.unique(written[0]))
        both = np.unique(
            np.concatenate([written, read[:, np.isin(read[0], written[0])]], 1), axis=1
        )
        return twice, len(both[0]) - len(np.unique(both[0])) - twice


class Interpreter:
    """Within it, each lane of each access of a kernel is an element of one of its arguments, and
    holds something when it is read.

    Programs of a launch must not touch what another writes, but for atomics; ``meeting`` kernels
    wait for one another between reading and writing, and there only writes count."""

    def __init__(self, meeting=()):
        self.meeting = meeting
        self.launches = []
        self.now = None

    def __enter__(self):
        import triton.runtime.interpreter as interpreter

        self.module, self.real = interpreter, interpreter._interpreter
        self.call, self.at = (
            interpreter.GridExecutor.__call__,
            interpreter.InterpreterBuilder.set_grid_idx,
        )
        watch = self

        def call(executor, *args, **kwargs):
            given = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            outer, watch.now = watch.now, Watched(given)
            try:
                watch.call(executor, *args, **kwargs)
                name = executor.fn.__name__
                twice, across = watch.now.races()
                assert not twice, f"{twice} bytes written by several programs of {name}"
                assert not across or name in watch.meeting, (
                    f"{across} bytes written by one program of {name} and read by another"
                )
                watch.launches.append(name)
            finally:
                watch.now = outer

        def at(builder, x, y, z):
            watch.now.program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
            watch.at(builder, x, y, z)

        interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.set_grid_idx = call, at
        interpreter._interpreter = SimpleNamespace(
            load=self.load, store=self.store, atomic_rmw=self.atomic_rmw, atomic_cas=self.atomic_cas
        )
        return self

    def __exit__(self, *exception):
        self.module._interpreter = self.real
        self.module.GridExecutor.__call__, self.module.InterpreterBuilder.set_grid_idx = (
            self.call,
            self.at,
        )

    def load(self, pointers, mask, other, dtype):
        self.now.use("read", pointers, mask, dtype.itemsize)
        made = self.real.load(pointers, mask, other, dtype)
        for kind, (_, poison) in POISON.items():
            if kind.is_floating_point and kind.itemsize == dtype.itemsize:
                fresh = (made.view(f"u{dtype.itemsize}") == poison) & (
                    self.now.np.asarray(mask) != 0
                )
                assert not fresh.any(), (
                    f"{int(fresh.sum())} elements are read that nobody has written"
                )
        return made

    def store(self, pointers, value, mask):
        self.now.use("written", pointers, mask, value.dtype.itemsize)
        return self.real.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        self.now.use("written", pointers, mask, value.dtype.itemsize, shared=True)
        return self.real.atomic_rmw(op, pointers, value, mask, sem)

    def atomic_cas(self, pointers, compared, value, sem):
        self.now.use(
            "written", pointers, self.now.np.ones(1, bool), value.dtype.itemsize, shared=True
        )
        return self.real.atomic_cas(pointers, compared, value, sem)
