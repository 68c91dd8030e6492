"""The bit convention: the one place that says how binary weights lie in memory.

A binary weight is +1 or -1. Bit 1 means +1, bit 0 means -1.

The weights of one convolution are a boolean array (O, C/g, kH, kW): output filter, input channel within the group, row
and column of the kernel; torch's order. Packed, they are a uint8 array (O, kH, kW, B) with B = ceil((C/g) / 8): the
channels go last, because a kernel walks over the channels of one tap, and eight of them share a byte. Input channel c
is bit c % 8 of byte c // 8, where bit 0 is the least significant: channel 0 has the value 1, channel 7 the value 128.
Bytes lie in C order, so the layout is the same on every machine, whatever its word size or byte order; reading eight
bytes as one little-endian 64-bit word makes channel c of these 64 bit c of the word.

Where C/g is not a multiple of 8 the upper bits of each last byte are padding. They are 0, always. Padding is not a
weight: a kernel that xors packed activations (whose padding is 0 too) with packed weights sees no difference there.
A padding bit that is set is therefore an error in the data, never a matter of taste, and `unpack_weight_bits` refuses.
Zero padding of the image is another thing: a tap outside the image contributes 0, which no bit can say.

Example: 10 channels, one 1x1 filter, +1 in channels 0, 3 and 8: bytes 0b00001001 = 9 and 0b00000001 = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from siman_convert.errors import InputError


def packed_bytes(channels: int) -> int:
    """Bytes that hold one tap of one filter over `channels` input channels (those of one group)."""
    return (channels + 7) // 8


def pack_weight_bits(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """(O, C/g, kH, kW) bool, True meaning +1, to (O, kH, kW, ceil(C/g / 8)) uint8.

    >>> bits = np.zeros((1, 10, 1, 1), dtype=np.bool_)
    >>> bits[0, [0, 3, 8]] = True
    >>> pack_weight_bits(bits)
    array([[[[9, 1]]]], dtype=uint8)
    """
    if bits.dtype != np.bool_:
        raise InputError(
            f"weight bits: expected dtype bool, got {bits.dtype}; compare the weights with a threshold first"
        )
    if bits.ndim != 4 or 0 in bits.shape:
        raise InputError(f"weight bits: expected a non-empty (O, C/group, kH, kW) array, got shape {bits.shape}")
    channels_last = np.ascontiguousarray(bits.transpose(0, 2, 3, 1))  # (O, kH, kW, C/g)
    return np.packbits(channels_last, axis=-1, bitorder="little")


def unpack_weight_bits(packed: npt.NDArray[np.uint8], channels: int) -> npt.NDArray[np.bool_]:
    """(O, kH, kW, ceil(channels / 8)) uint8 to (O, channels, kH, kW) bool; `channels` is C/group.

    >>> unpack_weight_bits(np.array([[[[5]]]], dtype=np.uint8), channels=3).ravel()
    array([ True, False,  True])
    """
    check_packed(packed, channels)
    bits = np.unpackbits(packed, axis=-1, count=channels, bitorder="little")  # (O, kH, kW, C/g) of 0 and 1
    return np.ascontiguousarray(bits.transpose(0, 3, 1, 2)).view(np.bool_)


def check_packed(packed: npt.NDArray[np.uint8], channels: int) -> None:
    """Refuse an array that is not the packed form of weights over `channels` input channels per group."""
    if channels < 1:
        raise InputError(f"packed weights: expected at least 1 input channel per group, got {channels}")
    if packed.dtype != np.uint8:
        raise InputError(f"packed weights: expected dtype uint8, got {packed.dtype}")
    if packed.ndim != 4 or 0 in packed.shape or packed.shape[-1] != packed_bytes(channels):
        expected = f"(O, kH, kW, {packed_bytes(channels)}) for {channels} channels per group"
        raise InputError(f"packed weights: expected a non-empty {expected}, got shape {packed.shape}")
    used_in_last_byte = channels - 8 * (packed_bytes(channels) - 1)  # 1..8
    stray = packed[..., -1] >> np.uint8(used_in_last_byte) if used_in_last_byte < 8 else np.zeros((), np.uint8)
    if stray.any():
        raise InputError(
            f"packed weights: padding bits beyond channel {channels - 1} must be 0, but {np.count_nonzero(stray)} of "
            f"{packed[..., -1].size} last bytes have some set; the data is damaged or `channels` is wrong"
        )
