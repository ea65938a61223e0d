"""Guards against accesses outside of tensors, and against races of programs.

``Guards`` places tensors between bands of poison: a write beside a tensor changes a band, a read of
a band or of unwritten memory leads to a NaN. ``Interpreter`` checks every address that a kernel
uses in Triton's interpreter. That runs programs one after the other, so that a race shows in the
addresses alone.
"""

import contextlib
import math
from types import SimpleNamespace

import pytest
import torch

np = pytest.importorskip("numpy")

# a NaN with bits that no arithmetic computes, and a number that is not a class
POISON = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FC5A5A5),
    torch.float64: (torch.int64, 0x7FF85A5A5A5A5A5A),
    torch.int32: (torch.int32, 0x5A5A5A5A),
    torch.int64: (torch.int64, 0x5A5A5A5A5A5A5A5A),
}
BAND = 256  # elements on either side of a tensor
ALLOCATORS = [(torch, name) for name in ("empty", "empty_like", "zeros", "zeros_like")]
ALLOCATORS += [(torch.Tensor, name) for name in ("new_empty", "new_zeros")]


class Guards:
    """Tensors between bands of poison, or of zeros."""

    def __init__(self, poison=True):
        self.poison, self.guarded = poison, []

    def place(self, t, lead=0, gap=0):
        """A copy of ``t``, ``lead`` elements past a boundary of 64 bytes, rows ``gap`` elements
        apart."""
        shape = (*t.shape[:-1], t.shape[-1] + gap) if t.dim() else ()
        strides = [math.prod(shape[i + 1 :]) for i in range(t.dim())]
        return self._between_bands(t, strides, lead)

    def _between_bands(self, t, strides, lead):
        pairs = zip(t.shape, strides, strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in pairs) if t.numel() else 0
        bits, poison = POISON[t.dtype]
        size = BAND + lead + reach + BAND
        memory = torch.full((size,), poison if self.poison else 0, dtype=bits, device=t.device)
        where = (t.shape, strides, BAND + lead)
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside.as_strided(*where).fill_(False)
        self.guarded.append((memory, outside, memory[outside], BAND + lead))
        return memory.view(t.dtype).as_strided(*where).copy_(t.detach())

    @contextlib.contextmanager
    def allocations(self):
        """Within it, functions such as torch.empty return guarded tensors, poisoned unless they are
        zeros."""

        def guarded(allocate):
            def call(*args, **kwargs):
                t = allocate(*args, **kwargs)
                if t.numel() == 0 or t.dtype not in POISON:
                    return t
                placed = self._between_bands(t, t.stride(), 0)
                if "empty" in allocate.__name__:
                    bits, poison = POISON[t.dtype]
                    placed.view(bits).fill_(poison)
                return placed

            return call

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ALLOCATORS:
                patch.setattr(owner, name, guarded(getattr(owner, name)))
            yield

    def check(self):
        """Raise if an element beside a tensor has changed."""
        for memory, outside, before, first in self.guarded:
            changed = (memory[outside] != before).nonzero()[:, 0]
            if len(changed):
                at = int(outside.nonzero()[changed[0], 0]) - first
                raise AssertionError(
                    f"{len(changed)} elements beside a tensor have changed, the first at {at} from"
                    " where it starts"
                )


class Launch:
    """Bytes that a launch may use, and those that each of its programs uses."""

    def __init__(self, tensors):
        self.allowed = np.unique(np.concatenate([_bytes_of(t) for t in tensors]))
        self.program, self.used = 0, {"read": [], "written": []}

    def use(self, how, pointers, mask, itemsize, *, atomic=False):
        pointers, mask = np.broadcast_arrays(pointers, mask)
        used = _widened(np.unique(pointers[mask != 0]), itemsize)
        outside = used[~np.isin(used, self.allowed)]
        if len(outside):
            raise AssertionError(
                f"{len(outside)} bytes {how} that are not elements of an argument, the first"
                f" {outside[0] - self.allowed[0]} bytes from the first argument"
            )
        if not atomic:
            self.used[how].append(np.stack([used, np.full_like(used, self.program)]))

    def races(self):
        """(bytes that several programs write, bytes that one writes and another reads)."""
        written, read = (
            np.unique(np.concatenate([np.empty((2, 0), np.uint64), *self.used[how]], 1), axis=1)
            for how in ("written", "read")
        )
        read = read[:, np.isin(read[0], written[0])]
        touched = np.unique(np.concatenate([written, read], 1), axis=1)
        twice, shared = (len(t[0]) - len(np.unique(t[0])) for t in (written, touched))
        return twice, shared - twice


def _bytes_of(t):
    at = np.zeros((), np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        at = at[..., None] + np.arange(size) * stride
    return _widened(t.data_ptr() + at.reshape(-1) * t.element_size(), t.element_size())


def _widened(addresses, itemsize):
    """The addresses of every byte of elements."""
    return (addresses.astype(np.uint64)[:, None] + np.arange(itemsize, dtype=np.uint64)).reshape(-1)


class Interpreter:
    """Within it, a kernel raises if it uses an address outside its arguments, if it reads memory
    that has not been written, or if its programs race.

    A race is a byte that one program writes and another reads or writes, atomics excepted. The
    programs of the kernels ``waiting`` wait for one another between reading and writing, so that
    only two writes are a race there."""

    def __init__(self, waiting=()):
        self.waiting, self.launches, self.launch = waiting, [], None

    def __enter__(self):
        from triton.runtime import interpreter

        self.real, self.patch = interpreter._interpreter, pytest.MonkeyPatch()
        executors, builders = interpreter.GridExecutor, interpreter.InterpreterBuilder
        run, set_program = executors.__call__, builders.set_grid_idx

        def call(executor, *args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            outer, self.launch = self.launch, Launch(tensors)
            try:
                run(executor, *args, **kwargs)
                name = executor.fn.__name__
                twice, across = self.launch.races()
                assert not twice, f"{twice} bytes written by several programs of {name}"
                assert not across or name in self.waiting, (
                    f"{across} bytes written by one program of {name} and read by another"
                )
                self.launches.append(name)
            finally:
                self.launch = outer

        def start_program(builder, x, y, z):
            _, height, depth = builder.grid_dim
            self.launch.program = (x * height + y) * depth + z
            set_program(builder, x, y, z)

        self.patch.setattr(executors, "__call__", call)
        self.patch.setattr(builders, "set_grid_idx", start_program)
        memory = SimpleNamespace(load=self.load, store=self.store, atomic_rmw=self.atomic_rmw)
        self.patch.setattr(interpreter, "_interpreter", memory)
        return self

    def __exit__(self, *exception):
        self.patch.undo()

    def load(self, pointers, mask, other, dtype):
        self.launch.use("read", pointers, mask, dtype.itemsize)
        values = self.real.load(pointers, mask, other, dtype)
        floats = [kind for kind in POISON if kind.is_floating_point]
        poisons = [POISON[kind][1] for kind in floats if kind.itemsize == dtype.itemsize]
        unwritten = np.isin(values.view(f"u{dtype.itemsize}"), poisons) & (np.asarray(mask) != 0)
        assert not unwritten.any(), f"{int(unwritten.sum())} elements are read before a write"
        return values

    def store(self, pointers, value, mask):
        self.launch.use("written", pointers, mask, value.dtype.itemsize)
        return self.real.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        self.launch.use("written", pointers, mask, value.dtype.itemsize, atomic=True)
        return self.real.atomic_rmw(op, pointers, value, mask, sem)
