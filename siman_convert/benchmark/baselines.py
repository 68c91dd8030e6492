"""What a binary network is measured against: the same architecture in full precision and in int8, as users would make them.

fp32: timm's model with as many classes, exported by torch with its BatchNorms folded into the convolutions; ONNX Runtime
then fuses Relu and Add into them when it opens the file. Time does not depend on the weights, as long as no activation
is denormal (a hundred times slower on some processors), so they are drawn at random, and BatchNorm statistics are taken
from a batch of noise, which keeps every activation near 1. timm starts some BatchNorms with a gamma of 0; it becomes 1.

int8: ONNX Runtime's quantize_static of that whole network with its defaults for CNNs: QDQ, int8 weights per channel, uint8
activations, every operator it can quantize. Measured with ONNX Runtime 1.32 on an AMD EPYC with AVX2, one thread, ResNet-18
at 224x224 (fp32 42.3 ms): this 23.0 ms; weights per tensor 22.9; after quant_pre_process, whose folding is done
already, 22.9; QOperator 23.0; int8 activations 39.3. 7-bit weights (reduce_range), which keep accuracy on processors
without VNNI, take 23.0: the 8 bits are left, accuracy plays no part here.

Where the binary file takes decoded images, so do these: the same preprocessing is put in front of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
from torch import nn

from siman_convert.description import Description
from siman_convert.errors import InputError, SimanError
from siman_convert.models import create, require_known
from siman_convert.onnx_export import INPUT, build_float_onnx
from siman_convert.onnx_int8 import quiet_quantizer
from siman_convert.onnx_preprocess import add_preprocess

_NOISE = 4  # images that statistics and int8 ranges are taken from


def write_float(description: Description, path: Path) -> None:
    """The full-precision network of that architecture, input size and number of classes, as an ONNX file.

    Raises InputError where timm has no such architecture or torch cannot export it.
    """
    name, size = description.architecture, description.preprocess.input_size
    require_known(name)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = settle_statistics(create(name, len(description.classes)).eval(), size)
        onnx.save(build_float_onnx(model, name, size), path)
    except Exception as error:  # any model may fail in its own way; without it there is nothing to compare with
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{name} cannot be built in full precision to compare with: {reason}") from error


@torch.no_grad()
def settle_statistics(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """Give a model's BatchNorms the statistics of noise, and a gamma of 1 where it was 0."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        if norm.affine:
            norm.weight[norm.weight == 0] = 1
        norm.momentum = 1.0
        norm.train()
    model(torch.randn(_NOISE, *size))
    return model.eval()


def write_int8(source: Path, size: tuple[int, int, int], target: Path) -> None:
    """An int8 version of the ONNX file `source`. Raises SimanError where ONNX Runtime's quantizer fails."""
    with quiet_quantizer():
        try:
            quantize_static(
                source,
                target,
                _Noise(size),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SimanError(f"ONNX Runtime's quantize_static failed: {reason}") from error


class _Noise:
    """Hands normal noise to quantize_static, one image at a time."""

    def __init__(self, size: tuple[int, int, int]) -> None:
        noise = np.random.default_rng(0).standard_normal((_NOISE, 1, *size), dtype=np.float32)
        self._batches = iter(noise)

    def get_next(self) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch}


def take_images(path: Path, description: Description) -> None:
    """Put the description's preprocessing in front of an ONNX file, in place."""
    onnx.save(add_preprocess(onnx.load(path), description.preprocess), path)
