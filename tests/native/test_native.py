"""The C library against the numpy reference, bit for bit: every variant that runs here, any number of threads."""

import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_library import NativeError, assert_same_with_signs, find_tool
from test_onnx_op import layer as make_layer

from siman_convert.runtime.reference import binary_conv2d

VARIANTS = ("amx", "avx512", "avx512vnni", "avx2", "neon", "scalar")
ODD = np.array([0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, np.inf, -np.inf, np.nan, 1.0, -1.0], np.float32)


def draw_floats(kind, rng, shape):
    if kind == "constant":
        return np.full(shape, rng.standard_normal(), np.float32)
    if kind == "denormal":
        return rng.choice(ODD[:6], shape)
    values = rng.standard_normal(shape)
    if kind == "cancelling":  # the mean is then rounding errors, which say in which order the sum was taken
        values *= 2.0 ** rng.integers(-40, 40, shape)
        for sample in values if values.ndim > 1 else [values]:
            flat = sample.reshape(-1)
            flat[(len(flat) + 1) // 2 :] = -flat[: len(flat) // 2][::-1]
    values = values.astype(np.float32)
    return np.where(rng.random(shape) < 0.02, rng.choice(ODD, shape), values) if kind == "odd" else values


@st.composite
def cases(draw):
    def pair(low, high):
        return [draw(st.integers(low, high)), draw(st.integers(low, high))]

    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    group = draw(st.sampled_from([1, 1, 2, 3]))
    channels = draw(st.integers(1, 200))
    filters = group * draw(st.sampled_from([1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 65, 96, 97]))
    kernel, strides, dilations, pads = pair(1, 4), pair(1, 3), pair(1, 3), pair(0, 3) + pair(0, 3)
    fit = [dilations[i] * (kernel[i] - 1) + 1 - pads[i] - pads[i + 2] for i in (0, 1)]
    image = [max(1, fit[i]) + draw(st.integers(0, 12)) for i in (0, 1)]
    out = [(image[i] + pads[i] + pads[i + 2] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1 for i in (0, 1)]
    batch = draw(st.integers(0, 5))
    kinds = st.sampled_from(["normal", "cancelling", "constant", "denormal", "odd"])
    X = draw_floats(draw(kinds), rng, (batch, group * channels, *image))
    W = np.packbits(rng.random((filters, *kernel, channels)) < 0.5, axis=-1, bitorder="little")
    residual_shape = draw(st.sampled_from([(batch, filters, *out), (1, 1, 1, 1)]))
    slope = draw(st.sampled_from([None, 0.0, 1.0, 0.25]))
    inputs = (
        X,
        W,
        draw_floats("normal", rng, filters),
        draw_floats(draw(kinds), rng, filters),
        draw_floats(draw(kinds), rng, residual_shape),
        draw_floats("normal", rng, filters) if slope is None else np.full(filters, slope, np.float32),
    )
    attributes = {"channels": channels, "strides": strides, "pads": pads, "dilations": dilations, "group": group}
    return inputs, attributes | {"center": draw(st.integers(0, 1))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_gives_the_bits_of_the_reference(library, variant):
    if not library.variants().get(variant):
        pytest.skip(f"{variant} does not run on this processor")

    @given(cases(), st.integers(0, 4))
    @settings(max_examples=120, deadline=None)
    def sweep(case, threads):
        inputs, attributes = case
        ran = []
        Y = library.conv(*inputs, **attributes, variant=variant, threads=threads, ran=ran)
        assert_same_with_signs(Y, binary_conv2d(*inputs, **attributes))
        assert ran == [variant]

    sweep()


def one_layer(channels=16, filters=8, size=6):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1, channels, size, size)).astype(np.float32)
    W = np.packbits(rng.random((filters, 3, 3, channels)) < 0.5, axis=-1, bitorder="little")
    ones = np.ones(filters, np.float32)
    attributes = {
        "channels": channels,
        "strides": [1, 1],
        "pads": [1] * 4,
        "dilations": [1, 1],
        "group": 1,
        "center": 1,
    }
    return {
        "X": X,
        "W": W,
        "scale": ones,
        "bias": ones,
        "residual": np.zeros((1, 1, 1, 1), np.float32),
        "slope": ones,
    } | attributes


@pytest.mark.parametrize("filters", [8, 40])
@pytest.mark.parametrize("threads", [0, 3])
def test_samples_that_are_summed_and_packed_in_several_tasks(library, threads, filters):
    layer = one_layer(channels=66, filters=filters, size=71)  # 332,706 floats; a task takes 32,768
    layer["X"] = draw_floats("cancelling", np.random.default_rng(1), layer["X"].shape)
    expected = binary_conv2d(**layer)
    for name, supported in library.variants().items():
        if supported:
            np.testing.assert_array_equal(library.conv(**layer, variant=name, threads=threads), expected)


SHAPES = {  # what networks have: channels, filters, size, and what differs from 3x3
    "wide": (64, 64, 56, {}),
    "stride 2": (64, 128, 56, {"strides": [2, 2]}),
    "narrow": (512, 80, 7, {}),
    "1x1": (256, 64, 14, {"kernel": (1, 1), "pads": [0] * 4, "strides": [2, 2]}),
    "5x5, dilated, asymmetric": (130, 33, 20, {"kernel": (5, 5), "pads": [3, 0, 6, 8], "dilations": [2, 2]}),
    "groups": (96, 96, 15, {"group": 3, "strides": [3, 1]}),
    "beyond what tiles are for": (64, 64, 9, {"pads": [0, 40, 30, 0], "dilations": [9, 17]}),
    "deep": (2048, 40, 7, {"kernel": (1, 1), "pads": [0] * 4}),
    "as wide as its kernel": (64, 64, 9, {"kernel": (1, 9), "pads": [0] * 4}),
    "one output pixel": (64, 64, 3, {"pads": [0] * 4}),
    "sums of more than 16 bits": (150_000, 33, 2, {"kernel": (1, 1), "pads": [0] * 4}),
    "strides beyond the image": (32, 40, 5, {"pads": [3, 4, 3, 4], "strides": [2, 6]}),
    "pads that no tap reaches": (32, 32, 8, {"pads": [2, 3, 3, 2], "strides": [3, 3], "kernel": (2, 1)}),
}


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_networks(library, name, threads):
    channels, filters, size, changes = SHAPES[name]
    rng = np.random.default_rng(2)
    (W, scale, bias, _, slope), attributes = make_layer(rng, channels, filters, **changes)
    X = rng.standard_normal((2, channels, size, size)).astype(np.float32)
    Y = binary_conv2d(X, W, scale, bias, np.zeros((1, 1, 1, 1), np.float32), slope, **attributes)
    residual = rng.standard_normal(Y.shape).astype(np.float32)
    expected = binary_conv2d(X, W, scale, bias, residual, slope, **attributes)
    for variant, supported in library.variants().items():
        if supported:
            Y = library.conv(X, W, scale, bias, residual, slope, **attributes, variant=variant, threads=threads)
            assert_same_with_signs(Y, expected)


def peak_memory():
    """KB, since "5" was written to /proc/self/clear_refs."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by /proc")
def test_padding_does_not_make_a_small_image_large(library):
    """One pixel of 262,144 channels, 1 MB, and 48x48 with what is around it."""
    channels = 1 << 18
    changes = {"kernel": (1, 1), "pads": [16] * 4, "strides": [16, 16]}
    layer, attributes = make_layer(np.random.default_rng(0), channels, 16, **changes)
    X = np.ones((1, channels, 1, 1), np.float32)
    for variant, supported in library.variants().items():
        if supported:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak_memory()
            library.conv(X, *layer, **attributes, variant=variant)
            assert peak_memory() - before < 100_000


def test_the_first_supported_variant_is_the_default(library, monkeypatch):
    monkeypatch.delenv("SIMAN_ISA", raising=False)
    ran = []
    library.conv(**one_layer(), ran=ran)
    assert ran == [next(name for name, supported in library.variants().items() if supported)]
    assert list(library.variants())[-1] == "scalar"


def test_the_environment_forces_a_variant(library, monkeypatch):
    for name, supported in library.variants().items():
        monkeypatch.setenv("SIMAN_ISA", name)
        ran = []
        if supported:
            library.conv(**one_layer(), ran=ran)
            assert ran == [name]
        else:
            with pytest.raises(NativeError, match="cannot run it"):
                library.conv(**one_layer())


def test_unknown_variant(library, monkeypatch):
    known = "unknown name; known are amx, avx512, avx512vnni, avx2, neon and scalar"
    with pytest.raises(NativeError, match=known):
        library.conv(**one_layer(), variant="")
    monkeypatch.setenv("SIMAN_ISA", "avx1024")
    with pytest.raises(NativeError, match=known):
        library.conv(**one_layer())


def test_an_empty_variable_is_none(library, monkeypatch):
    best, ran = [], []
    library.conv(**one_layer(), ran=best)
    monkeypatch.setenv("SIMAN_ISA", "")
    library.conv(**one_layer(), ran=ran)
    assert ran == best


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="names a variant of another architecture")
def test_variant_of_another_architecture(library):
    with pytest.raises(NativeError, match="cannot run it"):
        library.conv(**one_layer(), variant="neon")


HUGE = 2**31 - 1
MALFORMED = {
    "channels": ({"channels": 0}, "channels must be"),
    "weights": ({"channels": 24}, "W must hold"),
    "strides": ({"strides": [0, 1]}, "strides must be"),
    "strides huge": ({"strides": [1, 2**31]}, "strides must be"),
    "pads": ({"pads": [0, 0, -1, 0]}, "pads must be"),
    "dilations": ({"dilations": [1, 0]}, "dilations must be"),
    "group": ({"group": 0}, "group must be"),
    "group of filters": ({"group": 3}, "group must be"),
    "center": ({"center": 2}, "center must be"),
    "kernel": ({"dilations": [HUGE, 1]}, "larger than the padded image"),
    "output": ({"pads": [HUGE] * 4}, "more than 2147483647 elements"),
    "X": ({"X": np.ones((1, 15, 6, 6), np.float32)}, "X must be"),
    "X empty": ({"X": np.ones((1, 16, 0, 6), np.float32)}, "X must be"),
    "padding bits": ({"channels": 15}, "padding bits"),
    "taps": ({"channels": 2**24}, "at most 16777216"),
    "null": ({"X": None}, "null"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_arguments(library, case):
    changes, message = MALFORMED[case]
    arguments = one_layer()
    library.conv(**arguments)
    arguments |= {"W": np.full_like(arguments["W"], 255)} if case == "padding bits" else {}
    if case == "X":
        arguments["channels"] = 16
    if case == "null":
        arguments["scale"] = None
        changes = {}
    with pytest.raises(NativeError, match=message):
        library.conv(**(arguments | changes))


def test_pads_far_beyond_the_image(library):
    arguments = one_layer() | {"pads": [2**30] * 4, "strides": [2**25 - 1, 2**25 + 1]}
    expected = binary_conv2d(**arguments)
    np.testing.assert_array_equal(library.conv(**arguments), expected)


def test_cpp_sweep(build_folder):
    done = subprocess.run([build_folder / "siman_sweep", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar: same as plain loops" in done.stdout


def test_wide_instructions_stay_in_their_files(build_folder):
    """A weak or shared function in such a file could be the copy that the linker keeps for every caller."""
    objects = list(build_folder.rglob("isa_*.o"))
    assert objects
    for path in objects:
        listed = subprocess.run(
            [find_tool("nm"), "--defined-only", "-g", path], capture_output=True, text=True, check=True
        )
        assert [line.split()[1] for line in listed.stdout.splitlines()] == ["D"], listed.stdout


def test_exports_nothing_else(library):
    listed = subprocess.run(
        [find_tool("nm"), "-D", "--defined-only", library.path], capture_output=True, text=True, check=True
    )
    names = {line.split()[-1] for line in listed.stdout.splitlines() if line.split()[1] == "T"}
    assert {name for name in names if not name.startswith("siman_")} == {"RegisterCustomOps"}
