"""Does an exported file compute what the trained network does? Checked on real images, in every backend there is.

Operators: one by one, on the inputs they get (`operator_check`). Bound: equal values, every one.

Whole model: two backends see the same images, and the sign of every input of every binary convolution is compared. A
rounding difference can flip the sign of an activation that lies on the threshold, and from there on two correct backends
differ: that is a property of binary networks. So an image is judged at the first layer where a sign flips. Bounds:
    the flipped activations lie within NEAR standard deviations of the threshold
    an image without a flip has the same logits within LOGITS of its largest one
How often that changes the answer is the top-1 agreement, which is reported, not judged. Nor is the whole model of int8
weights, which differ by more than rounding.

Weights: the bits in the file are those of the network, layer by layer.
Preprocessing in the graph: within PIXELS of what evaluation does to an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from siman_convert.backends import subject_onnx
from siman_convert.data import (
    Preprocess,
    Source,
    Transform,
    eval_transform,
    open_source,
    pixel_transform,
    spread_batches,
)
from siman_convert.description import Description, description_of
from siman_convert.errors import InputError
from siman_convert.frozen import packed_layers
from siman_convert.layers import exact_mean
from siman_convert.names import SUFFIXES, is_file
from siman_convert.onnx_export import INPUT, OUTPUT, binary_nodes, operator_nodes
from siman_convert.onnx_file import OnnxFile
from siman_convert.onnx_op import INPUTS
from siman_convert.operator_check import COMPUTED, OperatorCheck, check_operators, named_inputs
from siman_convert.packed import round_to_half
from siman_convert.runs import Run, find_run
from siman_convert.runtime import native, reference
from siman_convert.subjects import (
    Subject,
    Which,
    open_file,
    packed_run,
    run_subject,
    subject_data,
)
from siman_convert.watch import Watcher

NEAR = 1e-4  # standard deviations of the sample
LOGITS = 1e-3  # of the image's largest |logit|
PIXELS = 6.0  # of 255; 2 were measured, and 6 with a Pillow before 13, which resizes in another order
IMAGES = 256  # compared unless asked otherwise
FAR = torch.finfo(torch.float32).max  # what NaN and infinite differences count as; JSON has neither
BATCH = 8  # images whose activations are held at once
OPERATOR_IMAGES = 2
REFERENCE_IMAGES = 4  # the reference is slow
PREPROCESSED_IMAGES = 16

Taps = dict[str, Tensor]  # layer -> its input (N, C, H, W)
Runner = Callable[[Tensor], tuple[Tensor, Taps]]  # normalised images (N, C, H, W) -> logits, taps


@dataclass
class LayerFlips:
    """Signs of a layer's input that two backends see differently; `farthest`: the distance from the threshold of those
    that were an image's first, in standard deviations of its sample. unexplained: images where that was beyond NEAR."""

    layer: str
    signs: int = 0
    flips: int = 0
    farthest: float = 0.0
    unexplained: int = 0


@dataclass
class ModelCheck:
    """Two backends on the same images. agreeing: images with the same top-1. largest_difference: of a logit, as a share
    of its image's largest one, over the images without a flip."""

    backends: tuple[str, str]
    layers: list[LayerFlips]
    images: int = 0
    agreeing: int = 0
    without_flip: int = 0
    largest_difference: float = 0.0


@dataclass
class Verification:
    """Everything that was compared, and `failures`: one line for each bound that does not hold.

    pixels: the largest difference of the graph's preprocessing from evaluation's, of 255; None where it has none.
    """

    operators: list[OperatorCheck]
    models: list[ModelCheck]
    pixels: float | None
    failures: list[str]


def verify_file(
    file: OnnxFile, packed: nn.Module | None, source: Source, images: int, watcher: Watcher
) -> Verification:
    """Compare `file` with the packed torch model it was exported from on images of `source.val`.

    None: there is none; then only the reference, which is slow, runs beside ONNX Runtime.
    """
    images = min(images if packed is not None else REFERENCE_IMAGES, images, len(source.val))
    watcher.say(f"verifying on {images} image{'s' if images > 1 else ''} of {source.name}")
    preprocess = file.description.preprocess
    core = _without_preprocessing(file.model) if file.variant.takes_images else file.model
    layers = {node.name: node.input[0] for node in binary_nodes(core)}
    centered = {node.name: _is_centered(node) for node in binary_nodes(core)}
    tapped = tapped_graph(core)
    ort = graph_runner(native.open_session(tapped.SerializeToString()).run, layers)
    batches = _images(source, eval_transform(preprocess), BATCH, images)
    first = next(batches)
    operators = list(check_operators(core, tapped, first[:OPERATOR_IMAGES]))
    numpy = graph_runner(reference.evaluator(tapped).run, layers)
    models = [compare(("reference", "onnxruntime"), numpy, ort, [first[:REFERENCE_IMAGES]], centered, watcher)]
    if packed is not None:
        watcher.start_evaluation(images)
        rest = _with(first, batches)
        models.append(compare(("torch", "onnxruntime"), torch_runner(packed), ort, rest, centered, watcher))
    pixels = _pixel_difference(file, source) if file.variant.takes_images else None
    failures = [line for check in operators for line in check.failures()]
    failures += [] if packed is None else _different_weights(core, packed)
    failures += [] if file.variant.int8 else [line for check in models for line in model_failures(check)]
    if pixels is not None and pixels > PIXELS:
        failures.append(f"preprocessing: a pixel differs by {pixels:.2f} of 255 from evaluation's, more than {PIXELS}")
    return Verification(operators, models, pixels, failures)


def verify(
    what: Run | str | Path | None = None,
    *,
    which: Which = "best",
    data: str | None = None,
    images: int = IMAGES,
    output: Path = Path("runs"),
    watcher: Watcher | None = None,
) -> dict[str, Verification]:
    """Verify a run's exported files (without any: what it would export), or one file; None: the newest run in `output`.

    A file in a run's folder is compared with the run's weights; elsewhere an ONNX file's graph is run by ONNX Runtime and
    by the reference. Returns what was found under the name of each file. Raises InputError.
    """
    if isinstance(what, str | Path) and is_file(what):
        subjects = [open_file(Path(what))]
    else:
        run = what if isinstance(what, Run) else find_run(what, output)
        files = [path for suffix in SUFFIXES if (path := run.folder / f"model{suffix}").is_file()]
        subjects = [open_file(path) for path in files] or [run_subject(run, which)]
    return {subject.name: _verify_subject(subject, data, images, watcher or Watcher()) for subject in subjects}


def _verify_subject(subject: Subject, data: str | None, images: int, watcher: Watcher) -> Verification:
    source = verification_source(subject, data, watcher)[0]
    trained = _trained(subject)
    foreign = [] if trained is None else list(_differences(subject, description_of(trained)))
    if foreign:  # nothing here that it could be compared with
        trained = None
    found = verify_file(subject_onnx(subject), subject.packed or trained, source, images, watcher)
    if subject.packed is not None and trained is not None:
        found.failures[:0] = different_tensors(subject.packed, trained)
    found.failures[:0] = foreign
    return found


def _trained(subject: Subject) -> nn.Module | None:
    """The packed form of the run's weights that a file was exported from, where the run is known."""
    if subject.run is None:
        return None
    description = subject.description
    packed = packed_run(subject.run, description.weights)
    return round_to_half(packed) if description.half else packed


def _differences(subject: Subject, trained: Description) -> Iterator[str]:
    """A line where a file in a run's folder is not of that run's network at all."""
    names = ("architecture", "plan", "preprocess", "classes")
    other = [name for name in names if getattr(subject.description, name) != getattr(trained, name)]
    if other:
        yield f"the file is not of the run it lies in: it has another {', another '.join(other)}"


def verification_source(subject: Subject, data: str | None, watcher: Watcher) -> tuple[Source, bool]:
    """The images to verify on, and whether they are the network's own. Labels do not matter here: where its own images
    cannot be had, scikit-learn's digits stand in. Raises InputError where `data` itself is wrong."""
    if data is not None:
        return subject_data(subject, data), True
    try:
        return subject_data(subject, None), True
    except InputError as error:
        watcher.note(f"{error}; verifying on scikit-learn's digits instead")
        return open_source("digits"), False


def different_tensors(packed: nn.Module, trained: nn.Module) -> list[str]:
    """A line for each tensor of a packed model that is not the trained one's."""
    found, expected = packed.state_dict(), trained.state_dict()
    names = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    return [f"{name}: not the run's values" for name in [*names, *(found.keys() - expected.keys())]]


# The whole model


def compare(
    backends: tuple[str, str],
    a: Runner,
    b: Runner,
    batches: Iterable[Tensor],
    layers: dict[str, bool],  # whether its threshold is the sample's mean, else 0
    watcher: Watcher,
) -> ModelCheck:
    """Two backends on the same batches: the signs of every input of `layers`, in the graph's order, and the logits."""
    check = ModelCheck(backends, [LayerFlips(layer) for layer in layers])
    for images in batches:
        (logits_a, taps_a), (logits_b, taps_b) = a(images), b(images)
        flipped = torch.zeros(len(images), dtype=torch.bool)
        for flips in check.layers:
            here = taps_a[flips.layer], taps_b[flips.layer]
            flipped |= _count_flips(flips, *here, layers[flips.layer], flipped)
        _compare_logits(check, logits_a, logits_b, flipped)
        watcher.evaluated(len(images))
    return check


def _count_flips(flips: LayerFlips, a: Tensor, b: Tensor, centered: bool, before: Tensor) -> Tensor:
    """Add a layer's flips of a batch; which images have some, (N,). Those of an image without any `before` are judged."""
    mean_a, mean_b = (exact_mean(x) if centered else x.new_zeros(1, 1, 1, 1) for x in (a, b))
    different = (a >= mean_a) != (b >= mean_b)
    flips.signs += different.numel()
    flips.flips += int(different.sum())
    here = different.flatten(1).any(dim=1)
    std = a.flatten(1).std(dim=1).clamp_min(1e-30).view(-1, 1, 1, 1)
    distance = torch.maximum((a - mean_a).abs(), (b - mean_b).abs()) / std
    farthest = torch.where(different, distance.nan_to_num(nan=FAR), 0.0).flatten(1).amax(dim=1)[here & ~before]
    flips.farthest = max([flips.farthest, *farthest.tolist()])
    flips.unexplained += int((farthest > NEAR).sum())
    return here


def _is_centered(node: onnx.NodeProto) -> bool:
    return any(attribute.name == "center" and attribute.i == 1 for attribute in node.attribute)


def _compare_logits(check: ModelCheck, a: Tensor, b: Tensor, flipped: Tensor) -> None:
    check.images += len(a)
    check.agreeing += int((a.argmax(dim=1) == b.argmax(dim=1)).sum())
    kept = ~flipped
    check.without_flip += int(kept.sum())
    share = ((a - b).abs().amax(dim=1) / a.abs().amax(dim=1).clamp_min(1e-30)).nan_to_num(nan=FAR)
    check.largest_difference = max([check.largest_difference, *share[kept].tolist()])


def model_failures(check: ModelCheck) -> Iterator[str]:
    """A line for each bound that two backends do not keep."""
    first, second = check.backends
    for index, flips in enumerate(check.layers):
        if flips.unexplained:
            before = f"between it and {check.layers[index - 1].layer}, or in that" if index else "before it"
            yield (
                f"{flips.layer}: {first} and {second} see its input differently, {flips.farthest:.1e} standard deviations "
                f"from the threshold (bound {NEAR:.0e}), on {flips.unexplained} of {check.images} images; the cause is {before}"
            )
    if check.largest_difference > LOGITS:
        last = check.layers[-1].layer if check.layers else "the input"
        yield (
            f"logits: {first} and {second} differ by {check.largest_difference:.1e} of the largest where no sign does "
            f"(bound {LOGITS:.0e}); the cause is in {last} or behind it"
        )


def _different_weights(model: onnx.ModelProto, packed: nn.Module) -> Iterator[str]:
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    layers, seen = packed_layers(packed), set()
    for node in binary_nodes(model):
        name = node.name.partition("#")[0]
        seen.add(name)
        found = numpy_helper.to_array(tensors[node.input[INPUTS.index("W")]])
        if name not in layers or not np.array_equal(found, layers[name].weight_bits.cpu().numpy()):
            yield f"{name}: its bits in the file are not those of the network"
    yield from (f"{name}: not in the file" for name in layers if name not in seen)


def torch_runner(packed: nn.Module) -> Runner:
    """The packed torch model, for `compare`."""

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Taps]:
        taps: Taps = {}

        def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            name, calls = str(layer.name), 2
            while name in taps:  # called again: the exported node has the same number
                name, calls = f"{layer.name}#{calls}", calls + 1
            taps[name] = inputs[0]

        hooks = [layer.register_forward_pre_hook(record) for layer in packed_layers(packed).values()]
        try:
            return packed(images), taps
        finally:
            for hook in hooks:
                hook.remove()

    return run


def graph_runner(run: Callable[..., Any], layers: dict[str, str]) -> Runner:
    """`run` is a session's or an evaluator's: (output names, feeds); `layers`: the value each one reads."""
    values = sorted({value for value in layers.values() if value != INPUT})

    def runner(images: Tensor) -> tuple[Tensor, Taps]:
        logits, *read = run([OUTPUT, *values], {INPUT: images.numpy()})
        by_value = {INPUT: images} | {
            name: torch.from_numpy(np.asarray(v)) for name, v in zip(values, read, strict=True)
        }
        return torch.from_numpy(np.asarray(logits)), {layer: by_value[value] for layer, value in layers.items()}

    return runner


def tapped_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that also puts out what every operator of ours reads."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    given = {tensor.name for tensor in model.graph.initializer} | {INPUT, OUTPUT}
    read = {value for node in operator_nodes(model) for name, value in named_inputs(node).items() if name in COMPUTED}
    for name in sorted(read - given):
        tapped.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return tapped


# Images


def _images(source: Source, transform: Transform, size: int, images: int) -> Iterator[Tensor]:
    return (batch.images for batch in spread_batches(source.val, transform, batch_size=size, images=images))


def _with(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _without_preprocessing(model: onnx.ModelProto) -> onnx.ModelProto:
    """The part of a graph that starts at the normalised pixels."""
    core = onnx.ModelProto()
    core.CopyFrom(model)
    needed, nodes = {OUTPUT}, list[onnx.NodeProto]()
    for node in reversed(model.graph.node):
        if needed & set(node.output) and INPUT not in node.output:
            nodes.insert(0, node)
            needed |= set(node.input)
    pixels = next(value for value in model.graph.value_info if value.name == INPUT)
    del core.graph.node[:], core.graph.input[:]
    core.graph.node.extend(nodes)
    core.graph.input.append(pixels)
    return core


def _pixel_difference(file: OnnxFile, source: Source) -> float:
    """The largest difference of a pixel between the graph's preprocessing and evaluation's, in 0..255 units."""
    preprocess: Preprocess = file.description.preprocess
    only = onnx.ModelProto()
    only.CopyFrom(file.model)
    pixels = next(value for value in file.model.graph.value_info if value.name == INPUT)
    only.graph.output.append(pixels)
    session = native.open_session(only.SerializeToString())
    units = 255 * torch.tensor(preprocess.std).view(1, -1, 1, 1)
    expected = _images(source, eval_transform(preprocess), 1, PREPROCESSED_IMAGES)
    given = _images(source, pixel_transform(preprocess), 1, PREPROCESSED_IMAGES)
    largest = 0.0
    for wanted, image in zip(expected, given, strict=True):
        found = session.run([INPUT], {session.get_inputs()[0].name: image.numpy()})[0]
        largest = max(largest, float(((torch.from_numpy(found) - wanted).abs() * units).nan_to_num(nan=FAR).max()))
    return largest
