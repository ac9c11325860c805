"""A second device for machines that have none: its tensors live in the CPU's memory, and mix as an accelerator's do.

An operation on tensors of both devices is an error, as is a generator of the other one, NumPy's view of a tensor of
this device, and an operation in place on the CPU with numbers from here. What a program does between devices is thus
seen, while its numbers are those of the CPU, bit for bit. :data:`READS` lists what the host waited for: numbers that
were brought to it, and operations whose shape depends on them.

It takes hold of the process that :func:`pretend` is called in: other tests run in another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

aten = torch.ops.aten

NAME = "pretended"
#: Operations that the host waited for, in order.
READS: list[str] = []

#: They take tensors of the CPU beside those of a device: copies, and indices.
MIXED = {aten._to_copy, aten.copy_, aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
#: The host waits for what these find.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2, aten.bincount}

_CPU = torch.device("cpu")
_GENERATORS: dict[int, Generator] = {}


class Far(Tensor):
    """A tensor that says it is on the second device; ``near`` holds its numbers."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = Tensor._make_wrapper_subclass(cls, near.size(), device=torch.device(NAME, 0), **layout)
        far.near = near
        return far

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"Far({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Far:
        if id(self) not in memo:
            copied = self.detach().clone()
            parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied) if parameter else copied
            memo[id(self)].requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.detach().near, self.requires_grad, isinstance(self, nn.Parameter))

    @property
    def data(self) -> Far:
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: Far) -> None:
        Tensor.data.__set__(self, new)
        self.near = new.near

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy


class Generator(torch.Generator):
    """A generator that knows which device it is said to be of."""

    def __new__(cls, device: Any = _CPU) -> Generator:
        made = super().__new__(cls, _CPU)
        made.of = torch.device(device)
        _GENERATORS[made._cdata] = made  # operations are given another object around the same address
        return made

    def __init__(self, device: Any = _CPU) -> None: ...

    @property
    def device(self) -> torch.device:
        return self.of


def pretend() -> torch.device:
    """Make this process have a second device, for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    torch.serialization.add_safe_globals([_rebuild])
    torch._C._set_only_lift_cpu_tensors(True)  # else torch.tensor(..., device=) goes past the mode
    torch.Generator = Generator
    _Mode().__enter__()
    return torch.device(NAME, 0)


class _Mode(TorchDispatchMode):
    """What makes new tensors on the device is given no tensor of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    operation, device = func.overloadpacket, kwargs.get("device")
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if type(tensor) is Far]
    if device is not None:
        is_far = torch.device(device).type == NAME
    else:
        is_far = type(args[0]) is Far if operation is aten.copy_ else bool(far)
    _check(func, tensors, kwargs.get("generator"), is_far)
    if far and (not is_far or operation in WAITING):
        READS.append(str(func))
    if device is not None:
        kwargs = {**kwargs, "device": _CPU}
    near_args, near_kwargs = tree_map_only(Far, lambda tensor: tensor.near, (args, kwargs))
    result = func(*near_args, **near_kwargs)
    if not is_far or operation is aten.lift_fresh:
        return result
    known = {id(tensor.near): tensor for tensor in far}
    result = tree_map_only(Tensor, lambda near: known.get(id(near)) if id(near) in known else Far(near), result)
    aliases = func._schema.is_mutable or any(returned.alias_info for returned in func._schema.returns)
    return return_and_correct_aliasing(func, args, kwargs, result) if far and aliases else result


def _check(func: Any, tensors: list[Tensor], generator: torch.Generator | None, is_far: bool) -> None:
    """Refuse what a device refuses: its tensors beside the CPU's, but for numbers, and generators of another device."""
    if func.overloadpacket not in MIXED and any(type(tensor) is Far for tensor in tensors):
        written = func._schema.is_mutable and type(tensors[0]) is not Far
        if written or any(type(tensor) is not Far and tensor.ndim for tensor in tensors):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {NAME}:0 and cpu ({func})")
    if generator is not None:
        own = _GENERATORS[generator._cdata].of.type if generator._cdata in _GENERATORS else "cpu"
        if own != (NAME if is_far else "cpu"):
            raise RuntimeError(f"Expected a generator of the tensor's device but found one of {own!r} ({func})")


def _rebuild(near: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    return nn.Parameter(Far(near), requires_grad) if is_parameter else Far(near).requires_grad_(requires_grad)
