"""Watching what a computation allocates, on torch's meta device, where tensors have shapes and lifetimes but no memory.

`Living` counts the bytes of all tensors that are alive, whoever holds them: code, autograd or a gradient. Storages
count once, so views and changes in place cost nothing. `Autocast` plays torch's autocast and the device that the
tensors stand for, which the meta device itself has neither of; its two lists are those of torch.amp's documentation.

What kernels take and give back within one call is not seen: workspaces of cuDNN, reordered copies of oneDNN.
"""

import weakref
from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

LOWERED = {
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "prelu", "linear"),
    *("matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "addbmm", "einsum", "scaled_dot_product_attention"),
}
"""Functions that autocast computes in the lower precision."""
RAISED = {
    "cuda": {
        *("group_norm", "layer_norm", "softmax", "log_softmax", "softmin", "exp", "log", "pow", "__pow__", "rsqrt"),
        *("softplus", "sum", "prod", "cumsum", "cumprod", "norm", "cosine_similarity", "cross_entropy", "nll_loss"),
    },
    "cpu": {"avg_pool3d", "grid_sample", "prod", "cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy"},
}
"""Functions that it computes in float32, unless they are told a type."""

FILLING = {
    "uniform_",
    "normal_",
    "fill_",
    "zero_",
    "copy_",
    "trunc_normal_",
    *(n for n in vars(nn.init) if n[-1] == "_"),
}
"""Functions that only change the values of a tensor, by name."""

Device = Literal["cuda", "cpu"]


def _batch_norm(image: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The normalised image, and mean and inverse deviation of each channel, as torch.ops.aten has it."""
    dtype = torch.float32 if weight is None else weight.dtype
    return torch.empty_like(image), *(image.new_empty(image.shape[1], dtype=dtype) for _ in range(2))


def _batch_norm_backward(outer: Tensor, image: Tensor, weight: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    """Gradients of image, weight and bias; the last argument says which are wanted."""
    wanted, like = rest[-1], (image, weight, weight)
    return tuple(None if one is None or not asked else torch.empty_like(one) for one, asked in zip(like, wanted))


SHORT: dict[Any, Any] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
    torch.ops.aten.threshold_backward.default: lambda outer, *rest: torch.empty_like(outer),
}
"""What operations give that torch works out on the meta device in Python, step by step: half of all the time."""


class Living(TorchDispatchMode):
    """The bytes of all storages that were made while it is active and are alive, in all and by kind.

    `kind` is what storages made from now on are counted as. `course` is what there was after each change, `most` the
    most of each kind at one time.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.course: list[int] = []
        self.most: Counter[str] = Counter()
        self.now: Counter[str] = Counter()
        self._kinds: dict[int, tuple[str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = SHORT.get(func, func)(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, Tensor):
                self.count(value)
        return made

    def count(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count the storage of `tensor`, once; with `kind` as that from now on."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._kinds:
            self._kinds[key] = (kind or self.kind, storage.nbytes())
            weakref.finalize(storage, self._forget, key)
        elif kind is None or kind == self._kinds[key][0]:
            return
        else:
            before, size = self._kinds[key]
            self.now[before] -= size
            self._kinds[key] = (kind, size)
        kind, size = self._kinds[key]
        self.now[kind] += size
        self.most[kind] = max(self.most[kind], self.now[kind])
        self.course.append(self.now.total())

    def _forget(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.now[kind] -= size


class Autocast(TorchFunctionMode):
    """Computes as autocast would on `device`; `lower` None: as without it. Tensors say that they lie on `device`."""

    def __init__(self, device: Device, lower: torch.dtype | None) -> None:
        super().__init__()
        self.device, self.lower = device, lower

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == IS_CUDA:
            return self.device == "cuda"
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            inputs = [*args, *(kwargs[part] for part in ("query", "key", "value") if part in kwargs)][:3]
            return FusedAttention.apply(*_cast(inputs, self.lower or inputs[0].dtype))
        if self.lower is not None:
            if name in LOWERED:
                args, kwargs = _cast((args, kwargs), self.lower)
            elif name in RAISED[self.device] and kwargs.get("dtype") is None:
                args, kwargs = _cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)


class FusedAttention(torch.autograd.Function):
    """What attention keeps on GPUs and CPUs: its inputs, its output and a number a row, never the shares of all pairs.

    Its values are never looked at; the meta device itself would count the shares (Dao et al., NeurIPS 2022).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in ctx.saved_tensors[:3])


class Unfilled(TorchFunctionMode):
    """Leaves out what only changes values: to go through it on the meta device takes longer than all the rest."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in FILLING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _cast(values: Any, dtype: torch.dtype) -> Any:
    lossy = (torch.float32, torch.float16, torch.bfloat16)
    return tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.dtype in lossy else v, values)
