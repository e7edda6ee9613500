"""A linear layer over int8 or int4 weights: the official format and glmkit's own, in plain torch on every device.

    weight        int8 (out, in), or int4 as int8 (out, in / 2): a byte holds two columns, the even one in the high
                  nibble, both in two's complement
    weight_scale  (out,): one for each row;  or (out, in / 32): one for each group of 32 columns
    w[o, i]     = q[o, i] * scale[o]      or   q[o, i] * scale[o, i // 32], rounded to the dtype of the scales

On a CPU with native kernels `pack` lays the same bytes out in blocks that the kernels read in order. Only this file and
`glmkit.kernels` know of blocks: whoever asks for the layer's tensors gets the ones above.

Source: quantization.py of ChatGLM-6B, ChatGLM2-6B and GLM-130B for bytes and rows; groups of 32 are glmkit's.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from glmkit.errors import UsageError

if TYPE_CHECKING:
    from glmkit.kernels.linear import Arena

GROUP = 32
"""Columns that share a scale in a format with groups."""
_LARGE_BYTES = 10**9  # of a model that is packed without being asked


def dequantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The matrix that quantised numbers stand for.

    Args:
        weight: int8 (out, in), for int4 (out, in / 2).
        scale: (out,) or (out, in / 32), floating point.
        bits: 8 or 4.

    Returns:
        (out, in), computed in the dtype of `scale` as the official kernels do.
    """
    if bits == 4:
        weight = unpack_nibbles(weight)
    if scale.ndim == 1:
        return weight.to(scale.dtype) * scale[:, None]
    groups = weight.to(scale.dtype).unflatten(1, (scale.shape[1], -1))
    return (groups * scale[:, :, None]).flatten(1)


def pack_nibbles(weight: Tensor) -> Tensor:
    """Two columns in a byte: int8 numbers from -8 to 7, (out, in), as int8 (out, in / 2)."""
    return (weight[:, 0::2] << 4) | (weight[:, 1::2] & 15)


def unpack_nibbles(weight: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack((weight >> 4, (weight << 4) >> 4), dim=-1).flatten(1)


class QuantizedLinear(nn.Module):
    """A linear layer whose `weight` and `weight_scale` are those of a quantised checkpoint, frozen.

    Args:
        weight: int8 (out, in), for int4 (out, in / 2).
        weight_scale: (out,) or (out, in / 32), float16 or bfloat16.
        bias: (out,) or None.
        bits: 8 or 4.

    Attributes:
        group_size: Columns that share a scale; None for one scale in each row.
        scale_dtype: Of the checkpoint's scales. Products were rounded in it, so `model.float()` must not change them.
        packed: Whether `weight` and `weight_scale` hold blocks, see `pack`.
    """

    weight: nn.Parameter
    weight_scale: nn.Parameter
    bias: nn.Parameter | None
    packed = False

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.out_features, self.in_features = weight.shape[0], weight.shape[1] * (8 // bits)
        self.group_size = None if weight_scale.ndim == 1 else self.in_features // weight_scale.shape[1]
        self.scale_dtype = weight_scale.dtype
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self._hold(weight, weight_scale, packed=False)
        self.register_state_dict_post_hook(_save_as_loaded)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Weight and scales as a checkpoint has them, whether or not the layer is packed."""
        if not self.packed:
            return self.weight.detach(), self.weight_scale.detach().to(self.scale_dtype)
        from glmkit.kernels import linear as native

        return native.unpack(self)

    def dequantize(self) -> Tensor:
        """The weight as a matrix, (out, in), in the dtype of the checkpoint's scales."""
        return dequantize(*self.stored(), self.bits)

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _FrozenProduct.apply(x, self)
            return result
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """`W x + b` in the dtype of x; of a packed layer by the kernels, which round x to int8 in groups of 32."""
        if self.packed and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
            from glmkit.kernels import linear as native

            return native.product(self, x)
        return self.exact_product(x)

    def exact_product(self, x: Tensor) -> Tensor:
        """`W x + b` in the dtype of x, by torch."""
        return F.linear(x, self.dequantize().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def extra_repr(self) -> str:
        groups = f", group_size={self.group_size}" if self.group_size else ""
        return f"{self.in_features}, {self.out_features}, bits={self.bits}{groups}"

    # Blocks ----------------------------------------------------------------------------------------------------------

    def pack(self, arena: Arena) -> bool:
        """Lays the weight out in blocks for the native kernels; its old memory is freed.

        Args:
            arena: Where the blocks go, with room for `glmkit.kernels.linear.packed_bytes` of this layer.

        Returns:
            Whether the layer is packed now: not one whose sizes or scales the kernels do not take, nor one elsewhere
            than on the CPU.
        """
        from glmkit.kernels import linear as native

        fits = native.fits(self.out_features, self.in_features, self.bits, self.group_size)
        if not self.packed and fits and self.weight.device.type == "cpu":
            blocks = native.pack(*self.stored(), self.bits, arena)
            if blocks is not None:
                self._hold(*blocks, packed=True)
        return self.packed

    def unpack(self) -> None:
        """Puts the checkpoint's own layout back, in memory of its own."""
        if self.packed:
            self._hold(*self.stored(), packed=False)

    def _hold(self, weight: Tensor, scale: Tensor, *, packed: bool) -> None:
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.packed = packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What `.to`, `.half()`, `.float()` and `.cuda()` call: blocks are for CPUs, and float32 means exact."""
        if self.packed:
            changed = fn(torch.empty(0, dtype=torch.bfloat16))
            if changed.device.type == "cpu" and changed.dtype in (torch.bfloat16, torch.float16):
                if self.bias is not None:
                    self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
                return self
            self.unpack()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they are not in the arena, so they are not packed."""
        state = dict(self.__dict__)
        state.pop("_native", None)  # what the kernels keep with a packed layer
        if self.packed:
            weight, scale = (nn.Parameter(tensor, requires_grad=False) for tensor in self.stored())
            state |= {"packed": False, "_parameters": self._parameters | {"weight": weight, "weight_scale": scale}}
        return state


def _save_as_loaded(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Saves rows and not blocks, and the scale in its own dtype also after `model.float()`: loading changes nothing."""
    assert isinstance(layer, QuantizedLinear)
    if layer.packed:
        state[f"{prefix}weight"], state[f"{prefix}weight_scale"] = layer.stored()
    else:
        state[f"{prefix}weight_scale"] = state[f"{prefix}weight_scale"].to(layer.scale_dtype)


class _FrozenProduct(torch.autograd.Function):
    """A layer's product, whose weight is made for it and again for the gradient of its input, and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.exact_product(x)  # what the gradient below belongs to

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantize().to(gradient.dtype), None


def pack_model(model: Any, kernels: str = "auto", *, any_dtype: bool = False) -> int:
    """Packs a model's quantised layers for the native kernels, one after the other, so that nothing is there twice.

    Args:
        model: The model; it notes `kernels` as `glm_kernels`, for what computes with it.
        kernels: "auto": if it computes in bfloat16 or float16; "native": always; "torch": never.
        any_dtype: "auto" packs a float32 model too.

    Returns:
        Number of layers that are packed now.

    Raises:
        UsageError: kernels="native", and there is no native code.
    """
    model.glm_kernels = kernels
    if kernels == "torch":
        return 0
    held = Counter(id(one) for module in model.modules() for one in module._parameters.values())
    layers = [
        module
        for module in model.modules()
        if isinstance(module, QuantizedLinear) and module.weight.device.type == "cpu" and held[id(module.weight)] == 1
    ]
    narrow = any_dtype or _dtype(model) in (torch.bfloat16, torch.float16)
    if kernels == "auto" and not (layers and narrow):
        return 0
    from glmkit.kernels import build
    from glmkit.kernels import linear as native

    status = build.status()
    if status.path is None:
        if kernels == "native":
            raise UsageError(f"kernels='native': there is no native code here: {status.why}", hint=status.hint)
        return 0
    sizes = [(layer.out_features, layer.in_features, layer.bits, layer.group_size) for layer in layers]
    nbytes = sum(native.packed_bytes(*size) for size in sizes if native.fits(*size))
    if not nbytes:
        return 0
    arena = native.Arena(nbytes)
    packed = sum(layer.pack(arena) for layer in layers)
    return_free_memory()
    return packed


def pack_large_model(model: Any) -> int:
    """Like `pack_model`, for the official ways to a model, where nobody can say how exact it shall be.

    From 1 GB on speed counts; smaller models are quick enough, and stay as exact as the official code.

    Args:
        model: The model, which keeps the choice of kernels that it was loaded with.

    Returns:
        Number of layers that are packed now.
    """
    nbytes = sum(tensor.nbytes for tensor in model.parameters())
    return pack_model(model, getattr(model, "glm_kernels", "auto")) if nbytes >= _LARGE_BYTES else 0


def return_free_memory() -> None:
    """Hands memory that was freed back to the system; glibc keeps some, of large layers up to a tenth of a model."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not every C library has it
        if trim is not None:
            trim(0)


def _dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in: the dtype of its numbers, beside scales, and a prefix, which are kept in others."""
    own = (
        one.dtype
        for name, one in model.named_parameters()
        if one.is_floating_point() and not name.endswith(".weight_scale") and ".prefix_encoder." not in name
    )
    return next(own, torch.float32)
