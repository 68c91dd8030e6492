"""The bit convention, pinned by bytes that were derived by hand from its prose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from siman_convert.bits import check_packed, pack_weight_bits, packed_bytes, unpack_weight_bits
from siman_convert.errors import InputError


def bits_with(shape, plus_ones):
    bits = np.zeros(shape, bool)
    for index in plus_ones:
        bits[index] = True
    return bits


GOLDEN = {
    "the example of the docstring": ((1, 10, 1, 1), [(0, 0, 0, 0), (0, 3, 0, 0), (0, 8, 0, 0)], [[[[9, 1]]]]),
    "least significant bit first": ((1, 8, 1, 1), [(0, 7, 0, 0)], [[[[128]]]]),
    "channel 8 opens the second byte": ((1, 9, 1, 1), [(0, 8, 0, 0)], [[[[0, 1]]]]),
    "filter, row, column, then channels": (
        (2, 3, 2, 2),
        [(0, 0, 0, 1), (0, 2, 0, 1), (0, 1, 1, 0), (1, 0, 1, 1), (1, 1, 1, 1), (1, 2, 1, 1)],
        [[[[0], [5]], [[2], [0]]], [[[0], [0]], [[0], [7]]]],
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_bytes(case):
    shape, plus_ones, expected = GOLDEN[case]
    bits = bits_with(shape, plus_ones)
    packed = pack_weight_bits(bits)
    assert packed.dtype == np.uint8
    assert packed.flags.c_contiguous
    assert packed.tolist() == expected
    np.testing.assert_array_equal(unpack_weight_bits(packed, shape[1]), bits)


def test_all_plus_ones_leave_the_padding_zero():
    assert pack_weight_bits(np.ones((1, 11, 1, 1), bool)).tolist() == [[[[255, 7]]]]


def test_eight_bytes_are_one_little_endian_word():
    packed = pack_weight_bits(bits_with((1, 64, 1, 1), [(0, 0, 0, 0), (0, 37, 0, 0), (0, 63, 0, 0)]))
    assert packed.view("<u8").item() == 1 + 2**37 + 2**63


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 4), st.integers(1, 4)),
    st.integers(0, 2**32 - 1),
)
def test_round_trip(shape, seed):
    bits = np.random.default_rng(seed).random(shape) < 0.5
    packed = pack_weight_bits(bits)
    assert packed.shape == (shape[0], shape[2], shape[3], packed_bytes(shape[1]))
    unpacked = unpack_weight_bits(packed, shape[1])
    assert unpacked.dtype == np.bool_
    np.testing.assert_array_equal(unpacked, bits)


@pytest.mark.parametrize("channel", [3, 4, 7])
def test_every_padding_bit_is_refused_when_set(channel):
    packed = pack_weight_bits(np.ones((2, 3, 1, 1), bool))
    packed[1, 0, 0, 0] |= 1 << channel
    with pytest.raises(InputError, match="padding bits beyond channel 2 must be 0, but 1 of 2"):
        unpack_weight_bits(packed, 3)


@pytest.mark.parametrize(
    ("packed", "channels", "message"),
    [
        (np.zeros((1, 1, 1, 2), np.uint8), 8, "got shape"),
        (np.zeros((1, 1, 1, 1), np.uint8), 9, r"\(O, kH, kW, 2\)"),
        (np.zeros((1, 1, 1), np.uint8), 8, "got shape"),
        (np.zeros((0, 1, 1, 1), np.uint8), 8, "non-empty"),
        (np.zeros((1, 1, 1, 1), np.int8), 8, "dtype uint8"),
        (np.zeros((1, 1, 1, 0), np.uint8), 0, "at least 1 input channel"),
    ],
)
def test_malformed_packed_weights(packed, channels, message):
    with pytest.raises(InputError, match=message):
        check_packed(packed, channels)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (np.zeros((1, 8, 1, 1), np.uint8), "dtype bool"),
        (np.zeros((8, 1, 1), bool), "got shape"),
        (np.zeros((1, 0, 1, 1), bool), "non-empty"),
    ],
)
def test_malformed_bits(bits, message):
    with pytest.raises(InputError, match=message):
        pack_weight_bits(bits)
