"""What of a file is in 8 bits, for people."""

from __future__ import annotations

from collections.abc import Iterator

from siman_convert.onnx_int8_plan import Quantization


def quantization_lines(found: Quantization) -> Iterator[str]:
    """One line for what there is, one for every convolution that computes in float32 all the same."""
    parts = [_count(len(found.convolutions), "8-bit convolution")] if found.convolutions else []
    if found.relus:
        pools = f" and {_count(len(found.pools), 'MaxPool')}" if found.pools else ""
        parts[0] += f", {_count(len(found.relus), 'Relu')}{pools} folded in"
    if found.classifiers:
        parts.append(_count(len(found.classifiers), "8-bit classifier"))
    if found.weights_only:
        parts.append(f"8-bit weights alone of {_count(len(found.weights_only), 'convolution')}")
    yield f"int8      {'; '.join(parts)}: {found.weights:,} weights of 1 byte, before 4"
    for name, reason in found.weights_only.items():
        yield f"int8      {name} computes in float32: {reason}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"
