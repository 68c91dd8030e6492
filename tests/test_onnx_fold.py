"""Every folding rule on a small graph: it folds where it may, says why where it may not, and the values stay."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import packed_models as pm
import pytest
from onnx import helper, numpy_helper

from siman_convert.bits import pack_weight_bits
from siman_convert.onnx_fold import NO_RESIDUAL, Folding, Refusal, fold
from siman_convert.onnx_op import DOMAIN, OP_NAME, VERSION, function_body
from siman_convert.runtime.reference import evaluator

OPSET = 20
FILTERS, CHANNELS, SIDE = 8, 6, 8  # as wide as there are filters: a slope along the wrong axis fits, too
SHAPE = f"[N, {FILTERS}, {SIDE}, {SIDE}]"
INPUTS = f"float[N, {CHANNELS}, {SIDE}, {SIDE}] x, float{SHAPE} r"
OUTPUT = f"float{SHAPE} y"
# Folding rounds once what was rounded after every step: a few units in the last place of the largest term of the sum.
ULPS = 8
Arrays = dict[str, np.ndarray]


class Case(NamedTuple):
    """A graph in ONNX's text form, where CONV(x) and NORM(x) stand for nodes with random parameters of their own."""

    body: str
    folded: dict[str, int] = {}  # noqa: RUF012  never written
    refused: tuple[tuple[str, str, str], ...] = ()  # (layer, operator, reason)
    inputs: str = INPUTS
    outputs: str = OUTPUT
    values: Arrays = {}  # noqa: RUF012  initializers that the text names


def build(case: Case, seed: int = 0) -> onnx.ModelProto:
    """The graph before folding, as the exporter leaves it: shapes everywhere, nodes named, layers in an attribute."""
    rng = np.random.default_rng(seed)
    values = {name: np.asarray(array, np.float32) for name, array in case.values.items()}

    def vector(name: str, low: float = -1.5, high: float = 1.5) -> str:
        values[name] = rng.uniform(low, high, FILTERS).astype(np.float32)
        return name

    def conv(found: re.Match[str]) -> str:
        name, x = found.groups()
        values[f"{name}_W"] = pack_weight_bits(rng.random((FILTERS, CHANNELS, 3, 3)) < 0.5)
        values["zero"] = np.zeros((1, 1, 1, 1))
        values[f"{name}_one"] = np.ones(FILTERS)
        inputs = f"{x}, {name}_W, {vector(f'{name}_scale')}, {vector(f'{name}_bias')}, zero, {name}_one"
        geometry = "strides = [1, 1], pads = [1, 1, 1, 1], dilations = [1, 1], group = 1, center = 1"
        return f'{name} = {DOMAIN}.{OP_NAME} <channels = {CHANNELS}, {geometry}, layer = "{name}"> ({inputs})'

    def norm(found: re.Match[str]) -> str:
        name, x = found.groups()
        inputs = ", ".join([*(vector(f"{name}_{part}") for part in ("gamma", "beta", "mean")), f"{name}_var"])
        vector(f"{name}_var", 0.2, 3)
        return f"{name} = BatchNormalization <epsilon = 0.001> ({x}, {inputs})"

    body = re.sub(r"(\w+) = CONV\((\w+)\)", conv, case.body)
    body = re.sub(r"(\w+) = NORM\((\w+)\)", norm, body)
    header = f'<ir_version: 10, opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>'
    model = onnx.parser.parse_model(f"{header} g ({case.inputs}) => ({case.outputs}) {{ {body} }}")
    for name, array in values.items():
        kept = array if array.dtype == np.uint8 else array.astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(kept, name))
    for node in model.graph.node:
        node.name = f"the_{node.output[0]}"
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def folded(before: onnx.ModelProto) -> tuple[onnx.ModelProto, Folding]:
    model = ir.serde.deserialize_model(before)
    report = fold(model.graph)
    return ir.serde.serialize_model(model), report


def runnable(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the attribute that only the exporter's graph has, with the function; checked."""
    ready = onnx.ModelProto()
    ready.CopyFrom(model)
    for node in ready.graph.node:
        kept = [attribute for attribute in node.attribute if attribute.name != "layer"]
        del node.attribute[:]
        node.attribute.extend(kept)
    ready.functions.append(function_body(OPSET))
    onnx.checker.check_model(ready, full_check=True)
    return ready


def feeds_of(model: onnx.ModelProto, batch: int = 3) -> Arrays:
    rng = np.random.default_rng(1)
    constants = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name not in constants:
            dims = [d.dim_value or (batch if i == 0 else SIDE) for i, d in enumerate(value.type.tensor_type.shape.dim)]
            feeds[value.name] = rng.standard_normal(dims).astype(np.float32)
    return feeds


def assert_same_values(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    """Of all outputs, in stock ONNX Runtime and in the reference evaluator."""
    old, new = runnable(before), runnable(after)
    assert [value.name for value in new.graph.output] == [value.name for value in old.graph.output]
    feeds = feeds_of(old)
    results = [pm.ort_session(old), pm.ort_session(new), evaluator(old), evaluator(new)]
    expected, *others = [session.run(None, feeds) for session in results]
    largest = max(np.abs(array).max() for array in expected)
    terms = CHANNELS * 9 * 1.5 * 1.5 / np.sqrt(0.2)  # acc * scale * gamma / std at most: what is rounded
    for other in others:
        for a, b in zip(other, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=ULPS * np.finfo(np.float32).eps * max(largest, terms))


def per_channel(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 1.5, shape).astype(np.float32)


USED_TWICE = "the output before it is used 2 times"
SUBTRAHEND = "it is what is subtracted"
COMPUTED = "what it subtracts is not one constant for each channel"
NO_SLOPE = "its slope is not one constant for each channel"
NOT_CONSTANT = "its parameters are not constant"
AFTER_ACTIVATION = "an activation is folded already"
AFTER_RESIDUAL = "a residual is folded already"
IS_OUTPUT = "the output before it is an output of the model"


def unequal(other: str, own: str = SHAPE) -> str:
    return f"its operands' shapes {other.replace(' ', '')} and {own.replace(' ', '')} are not provably equal"


CASES = {
    "nothing follows": Case("y = CONV(x)"),
    "another operator follows": Case("a = CONV(x) y = Sigmoid(a)"),
    "BatchNorm": Case("a = CONV(x) y = NORM(a)", {"BatchNormalization": 1}),
    "two BatchNorms": Case("a = CONV(x) b = NORM(a) y = NORM(b)", {"BatchNormalization": 2}),
    "the whole chain": Case(
        "a = CONV(x) b = NORM(a) c = Add(b, r) y = Relu(c)", {"BatchNormalization": 1, "Add": 1, "Relu": 1}
    ),
    "two layers": Case(
        "a = CONV(x) b = NORM(a) c = LeakyRelu <alpha = 0.3> (b) d = CONV(x) e = Add(r, d) y = Sub(c, e)",
        {"BatchNormalization": 1, "LeakyRelu": 1, "Add": 1},
        (("a", "Sub the_y", AFTER_ACTIVATION), ("d", "Sub the_y", SUBTRAHEND)),
    ),
    "BatchNorm after a residual": Case(
        "a = CONV(x) b = Add(a, r) y = NORM(b)", {"Add": 1}, (("a", "BatchNormalization the_y", AFTER_RESIDUAL),)
    ),
    "BatchNorm after an activation": Case(
        "a = CONV(x) b = Relu(a) y = NORM(b)", {"Relu": 1}, (("a", "BatchNormalization the_y", AFTER_ACTIVATION),)
    ),
    **{
        f"BatchNorm with its input {i} computed": Case(
            f"p = Exp(v) a = CONV(x) y = BatchNormalization(a, {'v, ' * i}p{', v' * (3 - i)})",
            refused=(("a", "BatchNormalization the_y", NOT_CONSTANT),),
            values={"v": np.linspace(0.5, 2, FILTERS)},
        )
        for i in range(4)
    },
    "BatchNorm of an input of the model": Case(
        "a = CONV(x) y = BatchNormalization(a, gamma, v, v, v)",
        refused=(("a", "BatchNormalization the_y", NOT_CONSTANT),),
        inputs=f"{INPUTS}, float[{FILTERS}] gamma",
        values={"v": np.linspace(0.5, 2, FILTERS)},
    ),
    "Add on the left": Case("a = CONV(x) y = Add(a, r)", {"Add": 1}),
    "Add on the right": Case("a = CONV(x) y = Add(r, a)", {"Add": 1}),
    "Add twice": Case("a = CONV(x) b = Add(a, r) y = Add(b, r)", {"Add": 1}, (("a", "Add the_y", AFTER_RESIDUAL),)),
    "Add after an activation": Case(
        "a = CONV(x) b = Relu(a) y = Add(b, r)", {"Relu": 1}, (("a", "Add the_y", AFTER_ACTIVATION),)
    ),
    "Add of itself": Case("a = CONV(x) y = Add(a, a)", refused=(("a", "Add the_y", USED_TWICE),)),
    "Add of a constant for each channel": Case(
        "a = CONV(x) y = Add(a, c)",
        {"Add": 1},
        values={"c": per_channel(1, FILTERS, 1, 1)},
    ),
    "shifts around a residual": Case(
        "a = CONV(x) b = Sub(a, c) d = NORM(b) e = Add(c, d) f = Add(e, r) g = Sub(f, s) y = PRelu(g, c)",
        {"Sub": 2, "BatchNormalization": 1, "Add": 2, "PRelu": 1},
        values={"c": per_channel(FILTERS, 1, 1), "s": per_channel(1)},
    ),
    "shifts after an activation": Case(
        "a = CONV(x) b = Relu(a) y = Sub(b, c)",
        {"Relu": 1},
        (("a", "Sub the_y", AFTER_ACTIVATION),),
        values={"c": per_channel(FILTERS, 1, 1)},
    ),
    "Sub from a constant": Case(
        "a = CONV(x) y = Sub(c, a)", refused=(("a", "Sub the_y", SUBTRAHEND),), values={"c": per_channel(1)}
    ),
    "Sub of what is computed": Case("a = CONV(x) y = Sub(a, r)", refused=(("a", "Sub the_y", COMPUTED),)),
    "Sub of itself": Case("a = CONV(x) y = Sub(a, a)", refused=(("a", "Sub the_y", USED_TWICE),)),
    "Add of fewer dimensions": Case(
        "a = CONV(x) y = Add(a, c)",
        refused=(("a", "Add the_y", unequal("[8, 8]")),),
        values={"c": per_channel(SIDE, SIDE)},
    ),
    "Add of fewer but equal dimensions": Case(
        "a = CONV(x) y = Add(a, s)",
        refused=(("a", "Add the_y", unequal("[8, 8, 8]", "[8, 8, 8, 8]")),),
        inputs=f"float[8, {CHANNELS}, {SIDE}, {SIDE}] x, float[8, {FILTERS}, {SIDE}] s",
        outputs=f"float[8, {FILTERS}, {SIDE}, {SIDE}] y",
    ),
    "Add of a batch of one": Case(
        "a = CONV(x) y = Add(s, a)",
        refused=(("a", "Add the_y", unequal("[1, 8, 8, 8]")),),
        inputs=f"float[N, {CHANNELS}, {SIDE}, {SIDE}] x, float[1, {FILTERS}, {SIDE}, {SIDE}] s",
    ),
    "Add that makes the output larger": Case(
        "a = CONV(x) y = Add(a, s)",
        refused=(("a", "Add the_y", unequal("[N, 8, 8, 8]", "[1, 8, 8, 8]")),),
        inputs=f"float[1, {CHANNELS}, {SIDE}, {SIDE}] x, float[N, {FILTERS}, {SIDE}, {SIDE}] s",
    ),
    "Add of another unknown": Case(
        "a = CONV(x) y = Add(a, s)",
        refused=(("a", "Add the_y", unequal("[M, 8, 8, 8]")),),
        inputs=f"float[N, {CHANNELS}, {SIDE}, {SIDE}] x, float[M, {FILTERS}, {SIDE}, {SIDE}] s",
        outputs=f"float[K, {FILTERS}, {SIDE}, {SIDE}] y",
    ),
    "Add of two layers": Case("a = CONV(x) b = CONV(x) y = Add(a, b)", {"Add": 1}),
    "Add of two layers, both normalised": Case(
        "a = CONV(x) b = NORM(a) c = CONV(x) d = NORM(c) e = Add(d, b) y = Relu(e)",
        {"BatchNormalization": 2, "Add": 1, "Relu": 1},
    ),
    "Add of two layers, the second activated": Case(
        "a = CONV(x) b = CONV(x) c = Relu(b) y = Add(a, c)", {"Add": 1, "Relu": 1}
    ),
    "Add of two layers, the first activated": Case(
        "a = CONV(x) b = Relu(a) c = CONV(x) y = Add(b, c)",
        {"Add": 1, "Relu": 1},  # into the second: the first has its activation already
    ),
    "the residual is computed later": Case(
        "a = CONV(x) b = Exp(r) c = Tanh(b) d = Add(a, c) y = Relu(d)", {"Add": 1, "Relu": 1}
    ),
    "Relu": Case("a = CONV(x) y = Relu(a)", {"Relu": 1}),
    "LeakyRelu": Case("a = CONV(x) y = LeakyRelu <alpha = 0.3> (a)", {"LeakyRelu": 1}),
    "LeakyRelu as it is": Case("a = CONV(x) y = LeakyRelu(a)", {"LeakyRelu": 1}),
    "PRelu, one slope": Case("a = CONV(x) y = PRelu(a, s)", {"PRelu": 1}, values={"s": per_channel(1)}),
    "PRelu, a scalar": Case("a = CONV(x) y = PRelu(a, s)", {"PRelu": 1}, values={"s": np.float32(-0.7)}),
    "PRelu, one for each channel": Case(
        "a = CONV(x) y = PRelu(a, s)", {"PRelu": 1}, values={"s": per_channel(FILTERS, 1, 1)}
    ),
    "PRelu, four dimensions": Case(
        "a = CONV(x) y = PRelu(a, s)", {"PRelu": 1}, values={"s": per_channel(1, FILTERS, 1, 1)}
    ),
    "PRelu along the width": Case(
        "a = CONV(x) y = PRelu(a, s)", refused=(("a", "PRelu the_y", NO_SLOPE),), values={"s": per_channel(SIDE)}
    ),
    "PRelu along the height": Case(
        "a = CONV(x) y = PRelu(a, s)", refused=(("a", "PRelu the_y", NO_SLOPE),), values={"s": per_channel(SIDE, 1)}
    ),
    "PRelu of every element": Case(
        "a = CONV(x) y = PRelu(a, s)",
        refused=(("a", "PRelu the_y", NO_SLOPE),),
        values={"s": per_channel(FILTERS, SIDE, SIDE)},
    ),
    "PRelu of a computed slope": Case(
        "a = CONV(x) s = Exp(r) y = PRelu(a, s)", refused=(("a", "PRelu the_y", NO_SLOPE),)
    ),
    "PRelu that reads the slope": Case(
        "a = CONV(x) y = PRelu(r, a)", refused=(("a", "PRelu the_y", "it is read as the slope"),)
    ),
    "PRelu of itself by itself": Case("a = CONV(x) y = PRelu(a, a)", refused=(("a", "PRelu the_y", USED_TWICE),)),
    "activation twice": Case(
        "a = CONV(x) b = Relu(a) y = LeakyRelu <alpha = 0.3> (b)",
        {"Relu": 1},
        (("a", "LeakyRelu the_y", AFTER_ACTIVATION),),
    ),
    "an activation that does nothing": Case(
        "a = CONV(x) b = PRelu(a, one) c = NORM(b) d = Add(r, c) y = Relu(d)",
        {"PRelu": 1, "BatchNormalization": 1, "Add": 1, "Relu": 1},
        values={"one": np.ones((FILTERS, 1, 1))},
    ),
    "one slope of many is not one": Case(
        "a = CONV(x) b = PRelu(a, s) y = Add(b, r)",
        {"PRelu": 1},
        (("a", "Add the_y", AFTER_ACTIVATION),),
        values={"s": np.array([1] * 7 + [0.5]).reshape(FILTERS, 1, 1)},
    ),
    "two readers": Case(
        "a = CONV(x) b = NORM(a) c = Relu(a) y = Add(b, c)",
        refused=(("a", "BatchNormalization the_b", USED_TWICE), ("a", "Relu the_c", USED_TWICE)),
    ),
    "two readers of the sum": Case(
        "a = CONV(x) b = Add(a, r) c = Relu(b) y = Mul(b, c)", {"Add": 1}, (("a", "Relu the_c", USED_TWICE),)
    ),
    "an output of the model": Case(
        "a = CONV(x) y = Relu(a)", refused=(("a", "Relu the_y", IS_OUTPUT),), outputs=f"{OUTPUT}, float{SHAPE} a"
    ),
    "an output of the model in the middle": Case(
        "a = CONV(x) b = NORM(a) y = Relu(b)",
        {"BatchNormalization": 1},
        (("a", "Relu the_y", IS_OUTPUT),),
        outputs=f"float{SHAPE} b, {OUTPUT}",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_folds_where_it_may_and_says_why_where_not(name: str) -> None:
    case = CASES[name]
    before = build(case)
    after, report = folded(before)
    assert dict(report.folded) == case.folded
    assert report.refused == [Refusal(*refusal) for refusal in case.refused]
    operators = [node for node in after.graph.node if node.domain == DOMAIN]
    assert report.operators == len(operators) == case.body.count("CONV(")
    # what was folded is gone, what was not is still there
    kinds = Counter(node.op_type for node in before.graph.node)
    kinds.subtract(case.folded)
    assert Counter(node.op_type for node in after.graph.node) == +kinds
    assert_same_values(before, after)


def test_cases_use_every_reason() -> None:
    """Those left have tests of their own below."""
    reasons = {refusal[2] for case in CASES.values() for refusal in case.refused}
    assert {USED_TWICE, NO_SLOPE, NOT_CONSTANT, AFTER_ACTIVATION, AFTER_RESIDUAL, IS_OUTPUT} <= reasons


def test_gammas_of_both_signs_and_zero() -> None:
    before = build(CASES["BatchNorm"])
    gamma = next(tensor for tensor in before.graph.initializer if tensor.name == "y_gamma")
    values = numpy_helper.to_array(gamma).copy()
    values[0] = 0
    gamma.CopyFrom(numpy_helper.from_array(values, "y_gamma"))
    assert (values < 0).any()
    assert (values > 0).any()
    after, report = folded(before)
    assert report.folded == {"BatchNormalization": 1}
    assert_same_values(before, after)


def test_folded_parameters_are_rounded_once() -> None:
    """scale' = scale * gamma / sqrt(var + eps) and bias' = (bias - mean) * that + beta, in float64, then float32."""
    before = build(CASES["BatchNorm"])
    after, _ = folded(before)
    given = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.graph.initializer}
    got = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    wide = {name: array.astype(np.float64) for name, array in given.items() if array.dtype == np.float32}
    epsilon = float(np.float32(0.001))  # the attribute is a float32
    factor = wide["y_gamma"] / np.sqrt(wide["y_var"] + epsilon)
    np.testing.assert_array_equal(got["a/scale"], (wide["a_scale"] * factor).astype(np.float32))
    bias = wide["a_bias"] * factor + (wide["y_beta"] - wide["y_mean"] * factor)
    np.testing.assert_array_equal(got["a/bias"], bias.astype(np.float32))
    np.testing.assert_array_equal(got["a_W"], given["a_W"])


@pytest.mark.parametrize(("epsilon", "variance"), [("0.0", 0.0), ("0.001", -1.0), ("0.001", np.nan), ("0.001", 0.5)])
def test_a_batch_norm_that_cannot_be_folded_in_numbers(epsilon: str, variance: float) -> None:
    vectors = {name: np.ones(FILTERS, np.float32) for name in ("gamma", "beta", "mean")}
    text = f"a = CONV(x) y = BatchNormalization <epsilon = {epsilon}> (a, gamma, beta, mean, var)"
    case = Case(text, values={**vectors, "var": np.array([1.0] * 7 + [variance])})
    _, report = folded(build(case))
    reason = "its parameters are not finite"
    possible = variance == 0.5
    assert report.refused == ([] if possible else [Refusal("a", "BatchNormalization the_y", reason)])
    assert report.folded == ({"BatchNormalization": 1} if possible else {})


def test_a_batch_norm_in_training_mode_stays() -> None:
    values = {name: per_channel(FILTERS) ** 2 for name in ("gamma", "beta", "mean", "var")}
    case = Case(
        "a = CONV(x) y, m, v = BatchNormalization <training_mode = 1> (a, gamma, beta, mean, var)", values=values
    )
    _, report = folded(build(case))
    assert report.refused == [Refusal("a", "BatchNormalization the_y", "it is in training mode")]


UNNAMED = ir.Shape(["N", FILTERS, None, None])  # nothing says that one None is another


@pytest.mark.parametrize("forgotten", [{"type": None}, {"shape": None}, {"shape": UNNAMED}])
@pytest.mark.parametrize("operands", ["a, s", "s, a"])
def test_values_of_unknown_type_or_shape_are_not_added(operands: str, forgotten: dict[str, ir.Shape | None]) -> None:
    case = Case(f"s = Exp(r) a = CONV(x) y = Add({operands})")
    assert folded(build(case))[1].folded == {"Add": 1}
    model = ir.serde.deserialize_model(build(case))
    values = [node.outputs[0] for node in model.graph if node.name != "the_y"]
    for name, nothing in forgotten.items():
        for value in values if nothing is UNNAMED else values[:1]:
            setattr(value, name, nothing)
    report = fold(model.graph)
    assert not report.folded
    assert [refusal.reason.endswith("are not provably equal") for refusal in report.refused] == [True]


def test_the_graph_after_folding() -> None:
    """Names, shared tensors and order, which the file keeps."""
    case = Case("a = CONV(x) b = Relu(a) c = CONV(x) d = Sigmoid(r) e = Add(c, d) y = Mul(b, e)")
    after, _ = folded(build(case))
    a, _, c, _ = after.graph.node
    assert [node.op_type for node in after.graph.node] == [OP_NAME, "Sigmoid", OP_NAME, "Mul"]
    assert (a.name, c.name) == ("a", "c")
    assert list(a.input) == ["x", "a_W", "a/scale", "a/bias", NO_RESIDUAL, "a/slope"]
    assert list(c.input) == ["x", "c_W", "c/scale", "c/bias", "d", "c/slope"]
    assert "layer" not in {attribute.name for node in after.graph.node for attribute in node.attribute}
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    np.testing.assert_array_equal(tensors[NO_RESIDUAL], np.zeros((1, 1, 1, 1), np.float32))
    np.testing.assert_array_equal(tensors["a/slope"], np.zeros(FILTERS, np.float32))
    np.testing.assert_array_equal(tensors["c/slope"], np.ones(FILTERS, np.float32))


def test_a_layer_that_is_called_twice_is_two_operators() -> None:
    before = build(Case("a = CONV(x) b = Relu(a) c = CONV(x) d = NORM(c) y = Add(b, d)"))
    for node in before.graph.node:
        for attribute in node.attribute:
            if attribute.name == "layer":
                attribute.CopyFrom(helper.make_attribute("layer", "conv"))
    after, report = folded(before)
    assert [node.name for node in after.graph.node if node.domain == DOMAIN] == ["conv", "conv#2"]
    assert report.folded == {"Relu": 1, "BatchNormalization": 1, "Add": 1}
    assert_same_values(before, after)


@pytest.mark.parametrize("seed", range(5))
def test_the_whole_chain_with_other_numbers(seed: int) -> None:
    before = build(CASES["the whole chain"], seed)
    after, _ = folded(before)
    assert [node.op_type for node in after.graph.node] == [OP_NAME]
    assert_same_values(before, after)
