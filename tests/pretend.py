"""A pretended accelerator for machines without one: tensors that report another device, and are computed on the CPU.

A `Pretended` tensor holds an ordinary one and reports the device "meta", the one device besides the CPU that every build of
torch lets take part in indexing and backward passes; here it means no more than "not the CPU". While a `Device` is active,
every operation of torch comes by here, those inside composite functions and backward passes included: it runs on the held
tensors, its result is on the device of its inputs, and one that mixes devices raises as it would between CPU and CUDA. What
CUDA lets mix may mix here: numbers (0-dimensional CPU tensors) in pointwise operations, and CPU indices into CUDA tensors.

`Device` also counts how often the host waits. A copy to the host for which it does not wait holds garbage until it waits for
something else. It does not see what kernels do (precision, alignment, memory, limits of shapes), when they do it, code that
asks for "cuda" by name (autocast, fused optimizers), or what torch.compile makes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

THERE = torch.device("meta")

aten = torch.ops.aten
# What hands values or sizes to the host, which waits for everything queued on the device before.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.nonzero.default}
READS |= {aten.masked_select.default, aten._unique2.default, aten.repeat_interleave.Tensor}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}

WHOLE = {
    aten.linear.default,
    aten.matmul.default,
    aten.scaled_dot_product_attention.default,
}  # whose parts are of no interest


class Pretended(Tensor):
    """A tensor that says it is `THERE`, of the contents of a CPU tensor that it holds."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        like: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=THERE, **like)  # type: ignore[attr-defined]
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError(f"{func} was called while no pretended device was active.")


class Device(TorchDispatchMode):
    """The pretended device, while active.

    Attributes:
        counts: "reads": copies to the host, and single values and sizes that it asks for; "stalls": copies from the host
            that return when everything queued before them is done, as torch's do unless they are `non_blocking`;
            "uploads": those that return at once; "downloads": copies to the host that do.
        read: numbers in all tensors that were copied to the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.read = self.depth = 0
        self.arriving: list[tuple[Tensor, Tensor]] = []  # downloads, and what they will hold
        self.patch = pytest.MonkeyPatch()

    @property
    def waits(self) -> int:
        """How often the host waited."""
        return self.counts["reads"] + self.counts["stalls"]

    def there(self, model: nn.Module) -> Any:
        """Moves a model in place, as `.to(device)` would: what is shared stays shared."""
        moved: dict[int, Tensor] = {}

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                made: Tensor = Pretended(tensor.detach().clone())
                moved[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
            return moved[id(tensor)]

        with self:
            for module in model.modules():
                for own in (module._parameters, module._buffers):
                    own.update({name: once(tensor) for name, tensor in own.items() if tensor is not None})
        return model

    def __enter__(self) -> Device:  # type: ignore[override]
        if self.depth == 0:  # it is entered again within itself
            make = torch.tensor  # which copies where no operation can be seen
            self.patch.setattr(torch, "tensor", lambda *args, device="cpu", **more: make(*args, **more).to(device))
        self.depth += 1
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.depth -= 1
        if self.depth == 0:
            self.patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose() and func not in WHOLE:
            with self:  # inference mode hands composite functions over whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        wanted = kwargs.get("device")
        tensors: list[Tensor] = []
        held_args, held_kwargs = _changed((args, kwargs), lambda tensor: tensors.append(tensor) or _held(tensor))
        ours = any(isinstance(tensor, Pretended) for tensor in tensors)
        stays = ours if wanted is None else torch.device(wanted) == THERE
        self._check(func, args, tensors)
        waits = self.waits
        self._count(func, args, kwargs, stays)
        if self.waits > waits:
            for target, contents in self.arriving:
                target.copy_(contents)
            self.arriving.clear()
        if wanted is not None:
            held_kwargs["device"] = torch.device("cpu")
        result = func(*held_args, **held_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if not stays:
            if ours and func is aten._to_copy.default and kwargs.get("non_blocking"):
                self.arriving.append((result, result.clone()))
                result.fill_(torch.nan if result.is_floating_point() else -1)
            return result
        with torch.inference_mode(False):  # an inference tensor could not share a version with the parameter it is a view of
            result = _changed(result, Pretended)
        return return_and_correct_aliasing(func, args, kwargs, result) if ours else result

    def _check(self, func: Any, args: tuple, tensors: list[Tensor]) -> None:
        """Raises where devices meet that may not."""
        if any(tensor.is_meta and not isinstance(tensor, Pretended) for tensor in tensors):
            raise RuntimeError(f"{func} got a tensor without contents; torch made it from a list, out of sight.")
        strangers = [tensor for tensor in tensors if not isinstance(tensor, Pretended)]
        if func is aten.copy_.default or len(strangers) in (0, len(tensors)):
            return
        if func in INDEXING and isinstance(args[0], Pretended):
            strangers = [value for value in args[2:3] if not isinstance(value, Pretended) and value.ndim > 0]
        elif torch.Tag.pointwise in func.tags:
            strangers = [tensor for tensor in strangers if tensor.ndim > 0]
        if strangers:
            shapes = [tuple(tensor.shape) for tensor in strangers]
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got CPU tensors of shapes {shapes}, too."
            )

    def _count(self, func: Any, args: tuple, kwargs: dict, stays: bool) -> None:
        copying = func is aten.copy_.default
        if copying or func is aten._to_copy.default:
            source = args[1] if copying else args[0]
            target = isinstance(args[0], Pretended) if copying else stays
            at_once = kwargs.get("non_blocking") or (copying and len(args) > 2 and args[2])
            if isinstance(source, Pretended) and not target:
                self.counts["downloads" if at_once and not copying else "reads"] += 1
                self.read += source.numel()
            elif target and not isinstance(source, Pretended):
                self.counts["uploads" if at_once else "stalls"] += 1
        elif func in READS and isinstance(args[0], Pretended):
            self.counts["reads"] += 1
            self.read += 1
        elif func in INDEXING and isinstance(args[0], Pretended):
            for index in args[1]:
                if index is not None and not isinstance(index, Pretended):
                    self.counts["stalls"] += 1
                elif index is not None and index.dtype == torch.bool:
                    self.counts["reads"] += 1


def _changed(value: Any, change: Any) -> Any:
    """The arguments or results of an operation with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_changed(part, change) for part in value)
    return {name: _changed(part, change) for name, part in value.items()} if isinstance(value, dict) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, Pretended) else tensor
