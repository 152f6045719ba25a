"""Runs Gluon kernels on the CPU, as Triton's interpreter does for plain kernels.

A kernel's own Python code is executed, program by program, with a stand-in for the language: a
tensor is a PyTorch tensor, a pointer an array with offsets, shared memory a buffer that copies
reach at once, and a layout nothing.  What a layout has to do with the result is stated in the
kernels by ``assert_trivial`` and checked when they are compiled; instructions written in assembly
are those of :func:`assembly`.  So the arithmetic, addresses, masks and loops of a kernel can be
compared with its twin where there is no GPU; races and instruction selection cannot.

    monkeypatch.setattr(decode, "_decode_kernel", Launcher(decode_gluon._decode_kernel))
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import operator
import types
from typing import Any

import torch

INDEX: tuple[int, ...] = (0, 0, 0)
"""Program that is running."""


def raw(x: Any) -> Any:
    """What is inside a stand-in."""
    return x.x if isinstance(x, Tensor) else x


def tensor(x: Any) -> torch.Tensor:
    """A PyTorch tensor of a value; Python numbers have 32 bits, as in Triton."""
    x = raw(x)
    if isinstance(x, torch.Tensor):
        return x
    kind = {bool: torch.bool, int: torch.int32}.get(type(x), torch.float32)
    return torch.tensor(x, dtype=kind)


class Tensor:
    """A tensor or scalar of the language."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    shape = property(lambda self: list(self.x.shape))
    dtype = property(lambda self: self.x.dtype)
    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        """Another dtype, of the value or of the bits."""
        return self.like(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def like(self, x: torch.Tensor) -> Tensor:
        """The same kind of thing with other numbers."""
        return type(self)(x)

    def reshape(self, shape: Any) -> Tensor:
        """Row-major, as in Triton."""
        return self.like(self.x.reshape([int(n) for n in shape]))

    def permute(self, order: Any) -> Tensor:
        """Dimensions in another order."""
        return self.like(self.x.permute(*order))

    def expand_dims(self, dim: int) -> Tensor:
        """A dimension of size 1 more."""
        return self.like(self.x.unsqueeze(dim))

    def split(self) -> tuple[Tensor, Tensor]:
        """Halves of a last dimension of size 2."""
        return self.like(self.x[..., 0]), self.like(self.x[..., 1])

    def __getitem__(self, at: Any) -> Tensor:
        return self.like(self.x[at])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)


def _operator(name: str) -> None:
    function = getattr(operator, name)

    def forward(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Tensor(function(self.x, raw(other)))

    def backward(self: Tensor, other: Any) -> Tensor:
        return Tensor(function(tensor(other), self.x))

    setattr(Tensor, f"__{name.strip('_')}__", forward)
    setattr(Tensor, f"__r{name.strip('_')}__", backward)


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod"),
    *("lshift", "rshift", "and_", "or_", "xor"),
):
    _operator(_name)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _operator(_name)
Tensor.__neg__ = lambda self: Tensor(-self.x)  # type: ignore[attr-defined]
Tensor.__hash__ = None  # type: ignore[assignment]


class Pointer(Tensor):
    """Offsets into an array."""

    def __init__(self, array: torch.Tensor, offsets: torch.Tensor) -> None:
        super().__init__(offsets)
        self.array = array

    dtype = property(lambda self: types.SimpleNamespace(element_ty=self.array.dtype))

    def like(self, x: torch.Tensor) -> Pointer:
        """Other offsets into the same array."""
        return Pointer(self.array, x)

    def __add__(self, other: Any) -> Pointer:
        return self.like(self.x + tensor(other).long())

    __radd__ = __add__


def pointer(array: torch.Tensor) -> Pointer:
    """Pointer to the first number of a tensor, over all of its storage."""
    flat = torch.empty(0, dtype=array.dtype).set_(array.untyped_storage())
    return Pointer(flat, torch.tensor(array.storage_offset()))


class Shared:
    """Shared memory."""

    layout = None

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    shape = property(lambda self: list(self.data.shape))

    def index(self, i: Any) -> Shared:
        """One row."""
        return Shared(self.data[int(i)])

    def slice(self, start: int, length: int) -> Shared:
        """A tile of a row; it must be aligned, as Triton asks."""
        assert start % length == 0 and start + length <= self.data.shape[0]
        return Shared(self.data[start : start + length])

    def load(self, layout: Any) -> Tensor:
        """What is there now."""
        return Tensor(self.data.clone())

    def store(self, x: Tensor) -> None:
        """Replace what is there."""
        self.data.copy_(x.x)

    def reinterpret(self, dtype: torch.dtype, shape: Any, layout: Any) -> Shared:
        """The same bytes as another dtype."""
        return Shared(self.data.view(-1).view(dtype).view([int(n) for n in shape]))


def load(p: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    """``gl.load``; what is masked may lie outside the array."""
    if mask is None:
        return Tensor(p.array[p.x])
    at, mask = torch.broadcast_tensors(p.x, tensor(mask))
    found = p.array[torch.where(mask, at, 0)]
    return Tensor(torch.where(mask, found, torch.tensor(other, dtype=found.dtype)))


def store(p: Pointer, value: Any, mask: Any = True) -> None:
    """``gl.store``."""
    at, value, mask = torch.broadcast_tensors(p.x, tensor(value), tensor(mask))
    p.array[at[mask]] = value[mask].to(p.array.dtype)


def async_load(to: Shared, p: Pointer) -> None:
    """A copy to shared memory that is complete at once."""
    to.data.copy_(p.array[p.x])


def mma_v2(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Product in float64, which holds subnormal bfloat16 exactly."""
    return Tensor((a.x.double() @ b.x.double() + c.x.double()).float())


def assembly(text: str, constraints: str, args: list, **options: Any) -> Tensor:
    """``gl.inline_asm_elementwise`` for the instructions that the kernels use."""
    args = torch.broadcast_tensors(*[tensor(x) for x in args])
    if text.startswith("lop3.b32") and "0xEA" in text:  # two halves of (a & b) | c
        word = (args[0][..., 0] & args[1][..., 0]) | args[2][..., 0]
        return Tensor(torch.stack([word & 0xFFFF, word >> 16], -1).short().view(torch.bfloat16))
    if text.startswith("movmatrix") and args[0].dtype == torch.int32:  # words of two half-words
        x = args[0].contiguous().view(torch.int16).view(-1, 8, 8)
        return Tensor(x.mT.contiguous().view(torch.int32).view(args[0].shape))
    if text.startswith("movmatrix"):
        x = args[0]
        blocks = x.reshape(x.shape[0] // 8, 8, x.shape[1] // 8, 8)
        return Tensor(blocks.permute(0, 3, 2, 1).reshape(x.shape))
    if "fma.rn.bf16x2" in text:  # x * y - 0
        return Tensor((args[0].float() * args[1].float()).bfloat16())
    if text.startswith("ex2.approx"):
        return Tensor(torch.exp2(args[0]))
    if text.startswith("rcp.approx"):
        return Tensor(1 / args[0])
    if text.startswith("div.rn.f32"):
        return Tensor(args[0] / args[1])
    if ".bf16x2" in text or ".f16x2" in text:  # two numbers in a word
        kind = torch.bfloat16 if ".bf16x2" in text else torch.float16
        x, y = (a.contiguous().view(kind) for a in args)
        if text.startswith("set.gt.u32"):
            return Tensor((-(x > y).short()).view(torch.int32))
        function = torch.minimum if text.startswith("min") else torch.maximum
        return Tensor(function(x, y).view(torch.int32))
    raise NotImplementedError(text)


def _binary(function: Any) -> Any:
    return lambda a, b: Tensor(function(tensor(a), tensor(b)))


def _reduce(function: Any) -> Any:
    return lambda x, axis: Tensor(function(x.x, axis))


def _fold(x: Any, axis: int, function: Any) -> Any:
    """``gl.reduce``: halves are combined until one row is left."""
    several = isinstance(x, tuple)
    parts = [p.x.movedim(axis, 0) for p in (x if several else (x,))]
    while len(parts[0]) > 1:
        half = len(parts[0]) // 2
        pairs = [Tensor(p[:half]) for p in parts] + [Tensor(p[half:]) for p in parts]
        found = function(*pairs)
        parts = [p.x for p in (found if several else (found,))]
    out = tuple(Tensor(p[0]) for p in parts)
    return out if several else out[0]


def _full(shape: Any, value: Any, dtype: torch.dtype, layout: Any = None) -> Tensor:
    return Tensor(torch.full([int(n) for n in shape], float(raw(value)), dtype=dtype))


def _where(c: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return a if c else b
    return Tensor(torch.where(tensor(c), raw(a), raw(b)))


def _nothing(*args: Any, **options: Any) -> None:
    return None


def _same(x: Any, *args: Any, **options: Any) -> Any:
    return x


LANGUAGE = types.SimpleNamespace(
    int16=torch.int16, int32=torch.int32, int64=torch.int64,
    float16=torch.float16, bfloat16=torch.bfloat16, float32=torch.float32,
    NVMMADistributedLayout=_nothing, DotOperandLayout=_nothing, SliceLayout=_nothing,
    BlockedLayout=_nothing, SwizzledSharedLayout=_nothing, DistributedLinearLayout=_nothing,
    static_range=range, static_assert=_nothing, convert_layout=_same, multiple_of=_same,
    max_contiguous=_same, load=load, store=store, inline_asm_elementwise=assembly,
    where=_where, minimum=_binary(torch.minimum), maximum=_binary(torch.maximum),
    exp2=lambda x: Tensor(torch.exp2(x.x)), log=lambda x: Tensor(torch.log(x.x)),
    reduce=_fold, reduce_or=lambda x, axis: _fold(x, axis, lambda a, b: a | b),
    max=_reduce(torch.amax), min=_reduce(torch.amin), sum=_reduce(torch.sum),
    arange=lambda a, b, layout=None: Tensor(torch.arange(a, b, dtype=torch.int32)),
    zeros=lambda shape, dtype, layout=None: _full(shape, 0, dtype), full=_full,
    zeros_like=lambda x: Tensor(torch.zeros_like(x.x)),
    broadcast=lambda a, b: tuple(Tensor(x) for x in torch.broadcast_tensors(a.x, b.x)),
    join=lambda a, b: Tensor(torch.stack([a.x, b.x], -1)),
    program_id=lambda axis: Tensor(torch.tensor(INDEX[axis], dtype=torch.int32)),
    # Unwritten shared memory reads as NaN in every dtype.
    allocate_shared_memory=lambda dtype, shape, layout: Shared(
        torch.full([int(n) for n in shape], -1, dtype=dtype)
    ),
)  # fmt: skip


def _range(*bounds: Any) -> Any:
    for i in range(*map(operator.index, bounds)):
        yield Tensor(torch.tensor(i, dtype=torch.int32))


REPLACED = {
    "gl": LANGUAGE,
    "mma_v2": mma_v2,
    "async_load": async_load,
    "async_copy": types.SimpleNamespace(commit_group=_nothing, wait_group=_nothing),
    "gdc_wait": _nothing,
    "gdc_launch_dependents": _nothing,
    "barrier": _nothing,
    "reinterpret": lambda buffer, *args: buffer.reinterpret(*args),
    "range": _range,
}
_namespaces: dict[str, dict[str, Any]] = {}


def _namespace(module: str) -> dict[str, Any]:
    """Globals of a kernel's module with the language replaced."""
    if module not in _namespaces:
        space = _namespaces[module] = {"__builtins__": builtins}
        for name, value in vars(importlib.import_module(module)).items():
            if name not in REPLACED and not name.startswith("__"):
                space[name] = python(value)
        space.update(REPLACED)
    return _namespaces[module]


def python(value: Any) -> Any:
    """A function or constant of the language as one of Python."""
    inner = getattr(value, "fn", None)
    if isinstance(inner, types.FunctionType):
        space = _namespace(inner.__module__)
        return types.FunctionType(inner.__code__, space, inner.__name__, inner.__defaults__)
    return getattr(value, "value", value) if type(value).__name__ == "constexpr" else value


class Launcher:
    """Stands for a kernel: ``launcher[grid](*args, **options)`` runs all programs in turn."""

    def __init__(self, kernel: Any) -> None:
        self.function = python(kernel)
        self.names = self.function.__code__.co_varnames[: self.function.__code__.co_argcount]

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            global INDEX
            values = dict(zip(self.names, args, strict=False))
            values |= {k: v for k, v in options.items() if k in self.names}
            values = {
                k: pointer(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()
            }
            for index in itertools.product(*(range(n) for n in grid)):
                INDEX = (*index, 0, 0)
                self.function(**values)

        return launch
