"""The packed form of a trained network: one bit a weight and one scale a channel, still a torch module.

`freeze` replaces every SiMaN layer by a PackedConv2d that gives the same output bit for bit. What remains is what a
file has to hold; both file formats are written from this module tree and `packed.load` gives it back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from siman_convert.bits import pack_weight_bits, packed_bytes
from siman_convert.errors import InputError
from siman_convert.layers import Geometry, SiMaNConv2d, exact_mean, geometry_of, pad_signs, signs_of
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, output_size
from siman_convert.plans import Plan
from siman_convert.surgery import binary_layers, planned_convs, planned_layers, put_in_place, swap

LAYER = "layer"  # attribute of an exported node that names the layer; the ONNX export takes it off again


class PackedConv2d(nn.Module):
    """y = scale * conv(sign(x - mean(x)), +-1 weights) + bias, for inference; without `center`, of sign(x).

    Buffers: `weight_bits` (O, kH, kW, ceil(C/g / 8)) uint8 as `bits` describes; `scale` (O,) float32; `bias` (O,)
    float32 or None. `name`: the layer's name in its model, which an exported node carries. Not trainable.
    """

    weight_bits: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        geometry: Geometry,
        bias: bool,
        name: str = "",
        center: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.geometry, self.name, self.center = geometry, name, center
        shape = (out_channels, *kernel_size, packed_bytes(in_channels // geometry.groups))
        self.register_buffer("weight_bits", torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(out_channels))
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)

    @classmethod
    def from_siman(cls, layer: SiMaNConv2d, name: str = "") -> PackedConv2d:
        """The packed form of a trained layer, on its device. Raises InputError unless it is float32."""
        if layer.binarizes != "all":
            raise InputError(
                f"{name or 'the layer'} binarizes {layer.binarizes} alone; only what is binary in both can be packed"
            )
        if layer.weight.dtype != torch.float32:
            raise InputError(f"{name or 'layer'}: packing needs float32 weights, got {layer.weight.dtype}")
        packed = cls.empty(layer, name, layer.center)
        packed.weight_bits = torch.from_numpy(pack_weight_bits(layer.bits().cpu().numpy()))
        packed.scale = layer.alpha.detach().clone()
        packed.bias = None if layer.bias is None else layer.bias.detach().clone()
        return packed.to(layer.weight.device).train(layer.training)

    @classmethod
    def empty(cls, conv: nn.Conv2d, name: str = "", center: bool = True) -> PackedConv2d:
        """A layer of the convolution's shape, all zeros, to be filled."""
        kernel = (conv.kernel_size[0], conv.kernel_size[1])
        return cls(conv.in_channels, conv.out_channels, kernel, geometry_of(conv), conv.bias is not None, name, center)

    @property
    def channels(self) -> int:
        """Input channels of one group."""
        return self.in_channels // self.geometry.groups

    @property
    def weight(self) -> Tensor:
        """For networks that ask a convolution's weight for its device, dtype or shape; of float32, and no memory of its own.

        None asks for the values: a convolution whose weight is read from outside stays in full precision.
        """
        return self.scale.view(-1, 1, 1, 1).expand(-1, self.channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H', W'), float32."""
        if torch.onnx.is_in_onnx_export():
            return self._symbolic(x)
        geometry = self.geometry.on(self.kernel_size, x.shape[2:])
        acc = integer_conv(x, self.weight_bits, self.channels, geometry, self.center)
        y = acc.mul_(self.scale.view(-1, 1, 1))
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)

    def extra_repr(self) -> str:
        g = self.geometry
        shape = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={g.stride}"
        rest = f"pads={'same' if g.same else g.pads}, dilation={g.dilation}, groups={g.groups}"
        return f"{shape}, {rest}, bias={self.bias is not None}, center={self.center}"

    def _symbolic(self, x: Tensor) -> Tensor:
        """One siman.BinaryConv2d node; the ONNX export folds into it what follows."""
        (sy, sx), (left, right, top, bottom), (dy, dx), *_ = self.geometry.on(self.kernel_size, x.shape[2:])
        kh, kw = self.kernel_size
        height = output_size(x.shape[2], kh, sy, top, bottom, dy)
        width = output_size(x.shape[3], kw, sx, left, right, dx)
        ones = torch.ones_like(self.scale)
        bias = torch.zeros_like(self.scale) if self.bias is None else self.bias
        attributes: dict[str, Any] = {
            "channels": self.channels,
            "strides": [sy, sx],
            "pads": [top, left, bottom, right],
            "dilations": [dy, dx],
            "group": self.geometry.groups,
            "center": int(self.center),
            LAYER: self.name,
        }
        inputs = (x, self.weight_bits, self.scale, bias, torch.zeros(1, 1, 1, 1), ones)
        shape = (x.shape[0], self.out_channels, height, width)
        node: Any = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{OP_NAME}", inputs, attributes, dtype=torch.float32, shape=shape, version=VERSION
        )
        y: Tensor = node
        return y


def freeze(model: nn.Module) -> nn.Module:
    """Replace the SiMaN layers of `model` by their packed form, in place, and return it in eval mode.

    Same outputs as the SiMaN model in eval mode, bit for bit. A model that is itself one layer: its replacement.
    """
    packed = {id(layer): PackedConv2d.from_siman(layer, name) for name, layer in binary_layers(model).items()}
    return swap(model, packed).eval()


def empty_packed(model: nn.Module, plan: Plan) -> nn.Module:
    """Carry out `plan` with packed layers of the convolutions' shapes, to be filled; in place."""
    convs, center = planned_convs(model, plan), not plan.topology.shifts
    layers = {name: PackedConv2d.empty(conv, name, center) for name, conv in convs.items()}
    return put_in_place(model, plan.topology, layers).eval()


def packed_layers(model: nn.Module) -> dict[str, PackedConv2d]:
    """The packed layers of a model by the plan's names, in the model's order."""
    return planned_layers(model, PackedConv2d)


def halved_names(model: nn.Module) -> set[str]:
    """The tensors of a packed model that --half stores as float16: weights of two or more dimensions left in full precision.

    Biases, BatchNorms and the packed layers' scales have one dimension and stay float32: they are small, and everything
    depends on them.
    """
    return {name for name, tensor in model.state_dict().items() if tensor.ndim >= 2 and tensor.is_floating_point()}


def integer_conv(x: Tensor, weight_bits: Tensor, channels: int, geometry: Geometry, center: bool = True) -> Tensor:
    """The operator's acc: x (N, C, H, W) float32 -> (N, O, Ho, Wo), whole numbers in float32."""
    threshold = exact_mean(x) if center else x.new_zeros(len(x), 1, 1, 1)
    signs, pads = pad_signs(signs_of(x, threshold, x.dtype), geometry.pads)
    weight = unpack(weight_bits, channels)
    return F.conv2d(signs, weight, None, geometry.stride, pads, geometry.dilation, geometry.groups).round_()


def unpack(weight_bits: Tensor, channels: int) -> Tensor:
    """(O, kH, kW, B) uint8 -> +-1 weights (O, channels, kH, kW), float32, on the same device."""
    signs = F.embedding(weight_bits.int(), _byte_signs(weight_bits.device))  # (O, kH, kW, B, 8)
    # Not contiguous(): it leaves the strides of a 1x1 kernel as they are, and then the convolution answers channels-last.
    return signs.flatten(3)[..., :channels].permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


def _byte_signs(device: torch.device) -> Tensor:
    """(256, 8) float32: the eight weights in every byte. Looking them up took half the time of shifting and masking."""
    byte = torch.arange(256, device=device)[:, None]
    return (byte >> torch.arange(8, device=device) & 1).mul_(2).sub_(1).float()
