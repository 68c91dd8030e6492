"""Nodes as nobody should write them: ONNX Runtime says what is wrong, or computes what the reference does; no crash."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st
from malformed_node import (
    BINARY,
    CHANGES,
    INTS,
    QUANTIZED,
    attempt,
    attempt_with_little_memory,
    model_of,
    new_process,
    right_node,
    right_quantized_node,
)

from siman_convert.errors import InputError

# No pad of these makes an output that is both allowed and larger than a few kB: 2**30 rows of 6 filters are too many.
NUMBERS = st.sampled_from([-(2**63), -(2**31), -1, 0, 1, 2, 3, 5, 8, 2**30, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1])
SMALL = st.integers(0, 7)
SHAPES = st.lists(SMALL, max_size=5).map(tuple)
FLOATS = st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38])
ODD_VALUES = st.one_of(st.none(), NUMBERS, st.lists(NUMBERS, max_size=5), st.just(1.5), st.just("1"), st.just([0.5]))


def like(name):
    """A value of the right kind, with the right count where it has one."""
    if name == "x_scale":
        return FLOATS | st.sampled_from([0.5, -1.0, 1e39])
    return (
        NUMBERS
        if name not in INTS
        else st.lists(NUMBERS, min_size=4, max_size=4)
        if name in ("pads", "pool_pads")
        else PAIRS
    )


PAIRS = st.lists(NUMBERS, min_size=2, max_size=2)
NEAR_X = st.tuples(st.sampled_from([0, 1, 2]), st.sampled_from([5, 10]), SMALL, SMALL)
FILTERS = st.sampled_from([0, 1, 6, 12])
NEAR_W = {
    BINARY: st.tuples(FILTERS, SMALL, SMALL, st.sampled_from([0, 1, 2])),
    QUANTIZED: st.tuples(FILTERS, st.sampled_from([1, 5, 10]), SMALL, st.sampled_from([0, 1, 3, 60])),
}


@st.composite
def changes(draw, operator):
    kind = draw(st.sampled_from(sorted(CHANGES)))
    name = draw(st.sampled_from(operator.inputs))
    attribute = draw(st.sampled_from([*operator.attributes, "extra"]))
    arguments = {
        "attribute": st.tuples(st.just(attribute), like(attribute) | ODD_VALUES),
        "shape": st.one_of(
            st.tuples(st.just(name), SHAPES),
            st.tuples(st.just("X"), NEAR_X),
            st.tuples(st.just("W"), NEAR_W[operator]),
        ),
        "dtype": st.tuples(st.just(name), st.sampled_from(["float64", "int8", "uint8", "int64", "bool", "float32"])),
        "fill": st.tuples(st.just(name), FLOATS),
        "number_of_inputs": st.tuples(st.integers(0, 8)),
        "outputs": st.tuples(st.sampled_from([(), ("",), ("y", "z"), ("", "z")])),
        "declared": st.tuples(st.none() | st.lists(st.sampled_from([None, "N", 0, 1, 2, 5, 6, 7]), max_size=5)),
    }
    return (kind, *draw(arguments.get(kind, st.tuples(st.just(name)))))


def expected(node):
    """What the reference computes; None where it refuses."""
    if node.is_refused:
        return None
    try:
        attributes = {name: node.meant[name] for name in node.operator.attributes}
        return node.operator.reference(**node.arrays, **attributes)
    except InputError:
        return None


@pytest.fixture(scope="module")
def process():
    holder = [new_process()]
    yield holder
    holder[0].shutdown()


def run_elsewhere(process, *arguments, function=attempt):
    try:
        return process[0].submit(function, *arguments).result(timeout=120)
    except BrokenProcessPool:
        process[0] = new_process()
        raise AssertionError("the process crashed") from None


def test_the_node_that_is_changed_is_right(library, process):
    for node in (right_node(1, 1), right_node(2, 1), right_quantized_node()):
        np.testing.assert_array_equal(run_elsewhere(process, library.path, *model_of(node)), expected(node))


BINARY_NODES = st.builds(right_node, group=st.integers(1, 2), center=st.integers(0, 1))


@pytest.mark.parametrize("nodes", [BINARY_NODES, st.builds(right_quantized_node)], ids=["binary", "quantized"])
def test_malformed_nodes(library, process, nodes):
    outcomes = {"computed": 0, "refused": 0}

    @given(nodes, st.data())
    @settings(max_examples=400, deadline=None)
    def sweep(node, data):
        changed = data.draw(st.lists(changes(node.operator), min_size=1, max_size=3))
        for kind, *arguments in changed:
            CHANGES[kind](node, *arguments)
        wanted, got = expected(node), run_elsewhere(process, library.path, *model_of(node))
        note(f"ONNX Runtime: {got}")
        outcomes["refused" if isinstance(got, str) else "computed"] += 1
        if isinstance(got, str):
            assert got
            assert wanted is None or node.may_be_refused
        else:
            np.testing.assert_array_equal(got, wanted)

    sweep()
    assert outcomes["computed"] > 20
    assert outcomes["refused"] > 100


@pytest.mark.skipif(sys.platform != "linux" or "LD_PRELOAD" in os.environ, reason="limits a process's address space")
def test_too_little_memory_is_an_error(library):
    """For the packed bits of a run: X has 64 Mi elements and takes 256 MiB, its bits at least 512."""
    node = right_node(group=1, center=0)
    channels = node.attributes["channels"] = 1
    node.arrays["W"] = np.ones((6, 1, 1, channels), np.uint8)
    node.arrays["X"] = np.ones((1, channels, 2**13, 2**13), np.float32)
    node.attributes["strides"] = [2**13, 2**13]
    node.attributes["pads"] = [0, 0, 0, 0]
    model, feeds = model_of(node)
    process = [new_process()]
    arguments = (64, library.path, model, feeds)
    assert "out of memory" in run_elsewhere(process, *arguments, function=attempt_with_little_memory)
    process[0].shutdown()


def test_what_the_c_interface_refuses(build_folder):
    done = subprocess.run([build_folder / "siman_refusals"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class FakeRuntime:
    """Another ONNX Runtime in this process: an OrtApiBase whose table has what registration calls, and remembers it."""

    def __init__(self, *, supports):
        pointer = ctypes.c_void_p
        self.calls, self.messages = [], []
        create_status = ctypes.CFUNCTYPE(pointer, ctypes.c_int, ctypes.c_char_p)(self._create_status)
        create_domain = ctypes.CFUNCTYPE(pointer, ctypes.c_char_p, ctypes.POINTER(pointer))(self._create_domain)
        add = ctypes.CFUNCTYPE(pointer, pointer, pointer)
        table = {0: create_status, 26: create_domain, 27: add(self._add_operator), 28: add(self._add_domain)}
        self.table = (pointer * 400)(*(ctypes.cast(table[i], pointer) if i in table else None for i in range(400)))
        self.get_api = ctypes.CFUNCTYPE(pointer, ctypes.c_uint32)(
            lambda version: ctypes.addressof(self.table) if version <= supports else None
        )
        self.base = (pointer * 2)(ctypes.cast(self.get_api, pointer), None)
        self.kept_alive = table

    def _create_status(self, _code, message):
        self.messages.append(message.decode())
        return 1

    def _create_domain(self, name, out):
        self.calls.append(name.decode())
        out[0] = id(self)

    def _add_operator(self, domain, _operator):
        self.calls.append(domain)

    def _add_domain(self, _options, domain):
        self.calls.append(domain)

    def register(self, library):
        function = library.c.RegisterCustomOps
        function.argtypes, function.restype = [ctypes.c_void_p] * 2, ctypes.c_void_p
        return function(None, self.base)


def test_an_onnxruntime_that_is_too_old(library):
    old = FakeRuntime(supports=18)
    assert old.register(library) is not None
    assert old.messages == ["siman_native needs ONNX Runtime 1.19 or later"]


def test_each_onnxruntime_of_a_process_gets_a_domain_of_its_own(library):
    runtimes = [FakeRuntime(supports=19) for _ in range(2)]
    for runtime in runtimes:
        assert runtime.register(library) is None
        assert runtime.register(library) is None
        assert runtime.calls == ["siman", *[id(runtime)] * 4]  # two operators into it, and it into two options
    node = right_node(group=1, center=1)
    np.testing.assert_array_equal(attempt(library.path, *model_of(node)), expected(node))
