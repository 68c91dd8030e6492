import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_makers import attempt
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siman_convert.data.images import decode, reason, to_grey_or_rgb
from siman_convert.errors import printable

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image: Image.Image, kind: str, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, format=kind, **options)
    return io.BytesIO(file.getvalue())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_grey_or_rgb(mode):
    grey = Image.fromarray(RAMP)
    image = Image.fromarray(RAMP.astype(np.uint16) * 256 + 99) if mode == "I;16" else grey.convert(mode)
    result = decode(encoded(image, "TIFF" if mode == "CMYK" else "PNG"))
    assert result.mode in ("L", "RGB")
    assert result.size == (16, 16)
    values = np.asarray(result.convert("L"))
    expected = np.asarray(image.convert("L")) if mode == "1" else RAMP
    np.testing.assert_allclose(values, expected, atol=1)


def test_palette_transparency_given_as_bytes_does_not_warn():
    file = encoded(Image.fromarray(RAMP).convert("P"), "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_grey_or_rgb(Image.open(file)).mode == "RGB"


def test_first_frame_and_no_exif_rotation():
    frames = [Image.new("RGB", (8, 4), color) for color in ("red", "blue")]
    animated = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert animated.convert("RGB").getpixel((0, 0)) == (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(frames[0], "JPEG", exif=exif)).size == (8, 4)


def test_a_decompression_bomb_is_refused():
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Image.DecompressionBombError) as caught:
        decode(io.BytesIO(bomb))
    assert "exceeds limit" in reason(caught.value)


PNG = encoded(Image.fromarray(RAMP), "PNG").getvalue()
JPEG = encoded(Image.fromarray(RAMP), "JPEG").getvalue()


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([PNG, JPEG]), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 255))
def test_broken_files_raise_or_decode_and_the_reason_is_one_line(content, cut, place, value):
    changed = bytearray(content)
    changed[place % len(changed)] = value
    result = attempt(lambda: decode(io.BytesIO(bytes(changed[: cut or None]))), Exception)
    if isinstance(result, Exception):
        assert len(reason(result).splitlines()) == 1
    else:
        assert result.mode in ("L", "RGB")


@given(st.binary(max_size=20).filter(lambda b: b"\0" not in b))
def test_printable_is_one_line_of_utf8(name):
    shown = printable(name.decode("utf-8", "surrogateescape"))
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
