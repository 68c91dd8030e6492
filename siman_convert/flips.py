"""Bit flips: which share of a binary layer's weights ended an epoch as the other bit than they began it.

Latent weights always move; the network changes only where one crosses its threshold. Bits are those of the trained weights, also
where an average of them is what is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from siman_convert.layers import SiMaNConv2d


class Flips:
    """Follows the bits of `layers`, by the plan's names; those whose weights are not binary have none.

    Eight bits a byte: to remember how an epoch began takes 1/32 of the weights' memory.
    """

    def __init__(self, layers: Mapping[str, SiMaNConv2d]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.binarizes != "activations"}
        self._before: dict[str, Tensor] = {}

    def start(self) -> None:
        """Remember the bits as they are."""
        self._before = {name: _packed(layer) for name, layer in self._layers.items()}

    def rates(self) -> dict[str, float]:
        """Share of each layer's bits, 0 to 1, that differ from those remembered; nothing where none are."""
        return {name: self._rate(name, layer) for name, layer in self._layers.items() if name in self._before}

    def save(self, path: Path) -> None:
        """Write what is remembered, for a resume within the epoch."""
        safetensors.torch.save_file(self._before, path)

    def load(self, path: Path) -> None:
        """Remember what `save` wrote; nothing where there is no such file (a state written before this was followed)."""
        self._before = safetensors.torch.load_file(path) if path.exists() else {}

    def _rate(self, name: str, layer: SiMaNConv2d) -> float:
        changed = np.bitwise_count(self._before[name].numpy() ^ _packed(layer).numpy()).sum()
        return round(float(changed) / layer.weight.numel(), 6)


def _packed(layer: SiMaNConv2d) -> Tensor:
    """The bits (C_out * n,) of a layer as bytes, zeros after the last."""
    return torch.from_numpy(np.packbits(layer.bits().cpu().numpy()))
