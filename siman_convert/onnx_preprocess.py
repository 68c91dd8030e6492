"""Preprocessing inside the exported file: decoded uint8 pixels in, what `eval_transform` gives the model out.

`add_preprocess` puts standard operators in front of a model that takes normalised pixels. Sizes and offsets of the
resize and the crop are torchvision's and timm's, number for number; the normalisation is the same bit for bit. The
resize is ONNX Runtime's antialiased Resize of uint8, a port of Pillow's with float32 in place of double weights;
nearest pixels are gathered at indices computed as Pillow does (Resize picks another pixel in 0.9 % of places).

Differences from Pillow 13 in ONNX Runtime 1.32, in pixels of 0..255, over 9 settings and 20 images of 10 sizes
(two photos and cuts of them), noise of those sizes, and noise of black and white only:
    nearest                            none, in 1,020 images of random sizes
    an image of the right size         none, with any filter
    bilinear, photos                   at most 1; mean 0.0010 where the image shrinks, 0.0005 where it grows
    bilinear, noise; black and white   at most 1 (2 seen once elsewhere); mean 0.0021 to 0.0022; 0.0013 to 0.0026
    bicubic, photos                    at most 1; mean 0.0001; 0.00005
    bicubic, noise; black and white    at most 1; at most 2; mean 0.0003 to 0.0014
They come from weighted means that end close to one half; a single image has a mean of 0.2 at most. Resize of
float32, which does not round between its two directions, is farther off: 0.09 in the mean on photos where that of
uint8 had 0.015 (one Resize each, without the order that follows).

Pillow resizes columns first, then rows; from version 13 it does rows first where the image loses more than twice as
many rows as columns. Pixels are rounded and clipped in between, so the order shows. The graph follows Pillow 13; in an
older Pillow photos for which it matters differ by up to 1 (bilinear) or 6 (bicubic), 0.07 in the mean.

Not expressible, and refused: lanczos, box and hamming filters, crop_mode "border", pad_to_size. torchvision's padding
of an image smaller than its crop is left out since it cannot occur: crop_pct is at most 1, so no side of the resized
image is below the crop's. Turning images of other modes into RGB or grey (`Image.convert`) is left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import onnx
import onnx.parser

from siman_convert.data.preprocess import Preprocess
from siman_convert.errors import InputError

INPUT = "images"
MIN_OPSET = 18  # Resize with antialias and axes
_FREE_DIMS = ("batch", "height", "width")
_DOUBLE, _FLOAT, _INT64 = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

# exclude_outside: Pillow renormalises the weights at the border, it does not repeat the last pixel.
_RESIZE_ATTRIBUTES = 'antialias = 1, exclude_outside = 1, coordinate_transformation_mode = "half_pixel"'
_FILTERS = {"bilinear": 'mode = "linear"', "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5'}


def add_preprocess(model: onnx.ModelProto, preprocess: Preprocess) -> onnx.ModelProto:
    """A copy of `model` that takes `images`, uint8 (batch, height, width, C) of any size, all images of one batch alike.

    The model's only input must be float32 (N, C, H, W) with (C, H, W) = preprocess.input_size, or free. A batch size
    that the model fixes stays fixed.
    """
    _require_expressible(preprocess)
    _require_fitting(model, preprocess)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    prefix = _free_prefix(graph)
    _rename_values(graph, {INPUT: f"{prefix}{INPUT}_of_model"})
    pixels = graph.input.pop()
    batch = pixels.type.tensor_type.shape.dim[0]
    _rename_dims(graph, {name: f"{prefix}{name}" for name in _FREE_DIMS} | {batch.dim_param: "batch"})
    for dim, size in zip(pixels.type.tensor_type.shape.dim[1:], preprocess.input_size, strict=True):
        dim.dim_value = size
    graph.value_info.append(pixels)
    shape = (batch.dim_value or "batch", "height", "width", preprocess.input_size[0])
    graph.input.append(onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.UINT8, shape))
    nodes = [*_preprocess_nodes(preprocess, prefix, pixels.name), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _require_expressible(pre: Preprocess) -> None:
    wrong = None
    if pre.pad_to_size:
        wrong = "pad_to_size (small images centred on black)"
    elif pre.crop_mode not in ("center", "squash"):
        wrong = f"crop_mode {pre.crop_mode!r}; expected center or squash"
    elif pre.interpolation not in (*_FILTERS, "nearest"):
        wrong = f"interpolation {pre.interpolation!r}; expected bilinear, bicubic or nearest"
    if wrong is not None:
        raise InputError(
            f"the exported file cannot do this preprocessing: {wrong}. "
            "Export without --with-preprocess and preprocess images as the file's metadata says"
        )


def _require_fitting(model: onnx.ModelProto, pre: Preprocess) -> None:
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset < MIN_OPSET:
        raise InputError(f"preprocessing needs a model of ONNX opset {MIN_OPSET} or later, got {opset}")
    names = [value.name for value in model.graph.input]
    if len(names) != 1:
        raise InputError(f"preprocessing needs a model with one input, got {len(names)}: {', '.join(names)}")
    if INPUT in {value.name for value in model.graph.output}:
        raise InputError(f"the model's output is called {INPUT!r}, which is to be the input's name: rename the output")
    tensor = model.graph.input[0].type.tensor_type
    dims = tensor.shape.dim
    expected = (0, *pre.input_size)
    fits = len(dims) == 4 and all(d.dim_value in (0, n) for d, n in zip(dims[1:], expected[1:], strict=True))
    if tensor.elem_type != _FLOAT or not fits:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type)
        shape = ", ".join(str(d.dim_value or d.dim_param or "?") for d in dims)
        size = ", ".join(map(str, pre.input_size))
        raise InputError(f"the model's input {names[0]} is {kind} ({shape}): expected FLOAT (batch, {size})")


# ----------------------------------------------------------------------------------------------- the operators


def _preprocess_nodes(pre: Preprocess, prefix: str, output: str) -> list[onnx.NodeProto]:
    """Nodes from `images` to `output`; every other name, and the name of every node, starts with `prefix`."""
    resize = _nearest_text() if pre.interpolation == "nearest" else _filter_text(_FILTERS[pre.interpolation])
    body = "\n".join([_sizes_text(pre), resize, _crop_text(pre), _normalise_text(pre)])
    graph = onnx.parser.parse_graph(f"preprocess (uint8[N, H, W, C] {INPUT}) => (float[N, C, h, w] pixels) {{{body}}}")
    renamed = {name: f"{prefix}{name}" for node in graph.node for name in node.output}
    for node in graph.node:
        node.name = renamed[node.output[0]]  # the last node too: it is called preprocess/pixels
    _rename_values(graph, renamed | {"pixels": output})
    return list(graph.node)


def _sizes_text(pre: Preprocess) -> str:
    """hw: the image's height and width; resized_hw: those it is resized to."""
    height, width = (math.floor(side / pre.crop_pct) for side in pre.input_size[1:])
    hw = f"hw = Shape <start = 1, end = 3> ({INPUT})\n"
    if pre.crop_mode == "squash":
        return f"{hw} resized_hw = {_int64s(height, width)}"
    if height == width:  # torchvision's Resize: int(side * long / short), and side * short / short = side
        return f"""{hw}
            side = {_int64s(height)}
            short = ReduceMin <keepdims = 1> (hw)
            side_by_hw = Mul (hw, side)
            resized_hw = Div (side_by_hw, short)"""
    # timm's ResizeKeepRatio: round(x / min(h / height, w / width)), in double and half to even as Python rounds
    return f"""{hw}
        target_hw = Constant <value = double[2] {{{height}.0, {width}.0}}> ()
        hw_double = Cast <to = {_DOUBLE}> (hw)
        ratios = Div (hw_double, target_hw)
        ratio = ReduceMin <keepdims = 1> (ratios)
        scaled_hw = Div (hw_double, ratio)
        rounded_hw = Round (scaled_hw)
        resized_hw = Cast <to = {_INT64}> (rounded_hw)"""


def _filter_text(mode: str) -> str:
    """Resize to resized_hw. One Resize does columns, then rows; rows that go first are done by a Resize before it,
    which does nothing otherwise. (N, H, W, C) throughout: behind a Transpose, ONNX Runtime 1.32 cannot load it."""
    return f"""
        lost_hw = Sub (hw, resized_hw)
        lost_h, lost_w = Split <axis = 0, num_outputs = 2> (lost_hw)
        lost_w_twice = Add (lost_w, lost_w)
        zero = {_int64s(0)}
        lost_h_limit = Max (lost_w_twice, zero)
        is_rows_first = Greater (lost_h, lost_h_limit)
        height, width = Split <axis = 0, num_outputs = 2> (hw)
        resized_height, resized_width = Split <axis = 0, num_outputs = 2> (resized_hw)
        first_height = Where (is_rows_first, resized_height, height)
        rows_first = Resize <{mode}, {_RESIZE_ATTRIBUTES}, axes = [1]> ({INPUT}, , , first_height)
        resize = Resize <{mode}, {_RESIZE_ATTRIBUTES}, axes = [1, 2]> (rows_first, , , resized_hw)"""


def _nearest_text() -> str:
    """Pillow's index of output pixel i: the integer part of step/2 + step + step + ... (i times), step = in / out."""
    return f"""
        in_double = Cast <to = {_DOUBLE}> (hw)
        out_double = Cast <to = {_DOUBLE}> (resized_hw)
        step_hw = Div (in_double, out_double)
        half = Constant <value = double {{0.5}}> ()
        first_hw = Mul (step_hw, half)
        step_h, step_w = Split <axis = 0, num_outputs = 2> (step_hw)
        first_h, first_w = Split <axis = 0, num_outputs = 2> (first_hw)
        resized_h, resized_w = Split <axis = 0, num_outputs = 2> (resized_hw)
        axis_0 = Constant <value_int = 0> ()
        from_first = {_int64s(0)}
        to_last = {_int64s(-1)}
        {_nearest_axis_text("h")}
        resize_h = Gather <axis = 1> ({INPUT}, index_h)
        {_nearest_axis_text("w")}
        resize = Gather <axis = 2> (resize_h, index_w)"""


def _nearest_axis_text(axis: str) -> str:
    """One step too many is added up: ONNX Runtime 1.32 takes an Expand to no elements for one to a single element."""
    return f"""
        steps_{axis} = Expand (step_{axis}, resized_{axis})
        summands_{axis} = Concat <axis = 0> (first_{axis}, steps_{axis})
        sums_{axis} = CumSum (summands_{axis}, axis_0)
        position_{axis} = Slice (sums_{axis}, from_first, to_last)
        index_{axis} = Cast <to = {_INT64}> (position_{axis})"""


def _crop_text(pre: Preprocess) -> str:
    """torchvision's CenterCrop starts at round(excess / 2), half to even: (excess + (excess // 2) % 2) // 2."""
    return f"""
        crop_hw = {_int64s(*pre.input_size[1:])}
        two = {_int64s(2)}
        excess_hw = Sub (resized_hw, crop_hw)
        excess_half = Div (excess_hw, two)
        round_up = Mod (excess_half, two)
        excess_to_even = Add (excess_hw, round_up)
        crop_start = Div (excess_to_even, two)
        crop_end = Add (crop_start, crop_hw)
        crop_axes = {_int64s(1, 2)}
        crop = Slice (resize, crop_start, crop_end, crop_axes)"""


def _normalise_text(pre: Preprocess) -> str:
    return f"""
        channels_first = Transpose <perm = [0, 3, 1, 2]> (crop)
        to_float = Cast <to = {_FLOAT}> (channels_first)
        white = Constant <value = float {{255.0}}> ()
        from_0_to_1 = Div (to_float, white)
        mean = {_per_channel(pre.mean)}
        minus_mean = Sub (from_0_to_1, mean)
        std = {_per_channel(pre.std)}
        pixels = Div (minus_mean, std)"""


def _int64s(*values: int) -> str:
    return f"Constant <value = int64[{len(values)}] {{{', '.join(map(str, values))}}}> ()"


def _per_channel(values: Sequence[float]) -> str:
    return f"Constant <value = float[1, {len(values)}, 1, 1] {{{', '.join(map(str, values))}}}> ()"


# ------------------------------------------------------------------------------------------- names and shapes


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and those inside its nodes (branches and loop bodies), which see its names."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _graphs(inner)


def _free_prefix(graph: onnx.GraphProto) -> str:
    """preprocess/, with a number where names in the model start so already."""
    taken = {name for inner in _graphs(graph) for name in _names(inner)}
    prefix, number = "preprocess/", 1
    while any(name.startswith(prefix) for name in taken):
        number += 1
        prefix = f"preprocess_{number}/"
    return prefix


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    for value in (*graph.input, *graph.initializer, *graph.value_info, *graph.output):
        yield value.name
    for node in graph.node:
        yield from (node.name, *node.input, *node.output)


def _rename_values(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.initializer, *inner.value_info, *inner.output):
            value.name = renamed.get(value.name, value.name)
        for node in inner.node:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            node.output[:] = [renamed.get(name, name) for name in node.output]


def _rename_dims(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Equal names mean equal sizes: the model's must not be equal to those of `images` by chance."""
    for inner in _graphs(graph):
        for value in (*inner.input, *inner.value_info, *inner.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = renamed.get(dim.dim_param, dim.dim_param)
