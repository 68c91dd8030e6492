"""`siman export`: a trained network to one self-contained file, verified on real images before it gets its name.

    run or packed file -> packed model -> (half) -> ONNX graph -> (int8) -> (preprocessing) -> verification -> file -> card

Nothing appears under its final name unless everything, verification included, went well.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from siman_convert.backends import OnnxRuntimeModel
from siman_convert.card import NAME as CARD
from siman_convert.card import Facts, File, is_replaceable, model_card
from siman_convert.costs import Costs, plan_costs
from siman_convert.data import Preprocess, Source, eval_transform, spread_batches
from siman_convert.description import Description, description_of
from siman_convert.errors import InputError, MismatchError, SimanError
from siman_convert.files import disk_errors, replacing
from siman_convert.metrics import AccuracyChange, Metrics, evaluate_model
from siman_convert.models import create
from siman_convert.names import SUFFIXES, require_usable
from siman_convert.onnx_export import build_onnx
from siman_convert.onnx_file import Variant, parse_onnx, seal
from siman_convert.onnx_fold import Folding
from siman_convert.onnx_int8 import quantize_rest
from siman_convert.onnx_int8_plan import Quantization
from siman_convert.onnx_preprocess import add_preprocess
from siman_convert.packed import load, round_to_half, save_packed
from siman_convert.plans import at_size
from siman_convert.publishing import push, require_pushable
from siman_convert.subjects import Subject, Which, open_subject
from siman_convert.verification import IMAGES, Verification, different_tensors, verification_source, verify_file
from siman_convert.watch import Watcher

Format = Literal["onnx", "safetensors", "all"]
FORMATS: tuple[Format, ...] = get_args(Format)
CALIBRATION_IMAGES = 256  # training images that int8 takes its ranges from
BATCH = 32


@dataclass(frozen=True)
class Exported:
    """What an export wrote and found. costs: the plan's figures, as `siman inspect` gives them; quantization: of int8.

    card: the model card beside the files; None where a README.md of somebody else's stands. uploaded_to: an address, or None.
    """

    files: tuple[Path, ...]
    description: Description
    variant: Variant
    folding: Folding
    quantization: Quantization | None
    costs: Costs
    change: AccuracyChange | None
    verification: Verification
    card: Path | None
    uploaded_to: str | None


@dataclass(frozen=True)
class _Built:
    """Everything of an export but the files."""

    packed: nn.Module
    onnx: bytes
    variant: Variant
    folding: Folding
    quantization: Quantization | None
    change: AccuracyChange | None


def export(
    what: nn.Module | str | Path | None = None,
    *,
    format: Format = "onnx",
    output: str | Path | None = None,
    which: Which = "best",
    half: bool = False,
    int8: bool = False,
    with_preprocess: bool = False,
    data: str | None = None,
    images: int = IMAGES,
    push_to_hub: str | None = None,
    runs: Path = Path("runs"),
    watcher: Watcher | None = None,
) -> Exported:
    """Export a run, a .safetensors file, or a module that `load` gave; None: the newest run in `runs`.

    `output`: a file, or a folder; None: the run's folder, or the file's. `half`: remaining full-precision weights as
    float16. `int8`: remaining convolutions and the classifier in 8 bits, calibrated on training images. `with_preprocess`:
    the ONNX graph takes decoded images. `data`: what to verify and calibrate on; None: the run's own. `images`: how many.
    `push_to_hub`: a repository of the Hugging Face hub, NAME or USER/NAME, that files and card are uploaded to in the end.

    Raises InputError for what cannot be, SimanError where an exporter fails, MismatchError where the file would not
    compute what the network does; nothing is written then.
    """
    watcher = watcher or Watcher()
    _check_options(format, half, int8, with_preprocess)
    subject = _open(what, runs, which)
    targets = _targets(subject, format, None if output is None else Path(output))
    repository = None if push_to_hub is None else require_pushable(push_to_hub)
    if subject.run is not None and subject.packed is not None and (unfinished := subject.run.unfinished()):
        watcher.note(f"{subject.run.folder} is {unfinished}: these are not the weights of a finished training")
    source, own = verification_source(subject, data, watcher)
    watcher.say(f"writing the graph of {subject.name}")
    built = _build(subject, half, int8, with_preprocess, source if own else None, images)
    verification = verify_file(parse_onnx(built.onnx), built.packed, source, images, watcher)
    if verification.failures:
        more = f" ({len(verification.failures) - 1} more)" if len(verification.failures) > 1 else ""
        raise MismatchError(f"the exported file is wrong, nothing was written: {verification.failures[0]}{more}")
    description = description_of(built.packed)
    with torch.device("meta"):
        skeleton = create(description.architecture, len(description.classes))
    costs = plan_costs(skeleton, at_size(description.plan, skeleton, description.preprocess.input_size))

    def card_of(files: Sequence[File]) -> str:
        return model_card(Facts(files, description, built.variant, costs, built.change, verification, subject.run))

    text, card = _write_all(built, targets, card_of)
    if card is None:
        watcher.note(f"{targets[0].parent / CARD} is not siman's: it stays, and no model card is written")
    found = built.folding, built.quantization, costs, built.change, verification, card
    return Exported(
        targets, description, built.variant, *found, push(repository, targets, text) if repository else None
    )


def _build(
    subject: Subject, half: bool, int8: bool, with_preprocess: bool, measured: Source | None, images: int
) -> _Built:
    """`measured`: the network's own images, on which the cost of rounding is measured."""
    packed = subject.packed
    assert packed is not None  # _open refuses ONNX files
    change, quantization, preprocess = None, None, subject.description.preprocess

    def top1(model: nn.Module) -> Metrics | None:
        if measured is None:
            return None
        batches = spread_batches(measured.val, eval_transform(preprocess), batch_size=BATCH, images=images)
        return evaluate_model(model, batches, torch.device("cpu"))

    if half and not subject.description.half:
        before = top1(packed)
        round_to_half(packed)
        change = _change(before, top1(packed))
    graph, folding = build_onnx(packed)
    if int8:
        if measured is None:
            raise InputError(f"{subject.name}: int8 is calibrated on training images; name some with --data")
        before = top1(OnnxRuntimeModel(graph.SerializeToString()))
        graph, quantization = quantize_rest(graph, _calibration(measured, preprocess))
        change = _change(before, top1(OnnxRuntimeModel(graph.SerializeToString())))
    if with_preprocess:
        graph = add_preprocess(graph, preprocess)
    variant = Variant(takes_images=with_preprocess, int8=int8)
    return _Built(packed, seal(graph, description_of(packed), variant), variant, folding, quantization, change)


def _calibration(source: Source, preprocess: Preprocess) -> Iterator[npt.NDArray[np.float32]]:
    transform = eval_transform(preprocess)
    for batch in spread_batches(source.train, transform, batch_size=BATCH, images=CALIBRATION_IMAGES):
        yield batch.images.numpy()


def _change(before: Metrics | None, after: Metrics | None) -> AccuracyChange | None:
    return AccuracyChange(before.top1, after.top1, after.images) if before and after else None


def _write_all(
    built: _Built, targets: tuple[Path, ...], card_of: Callable[[Sequence[File]], str]
) -> tuple[str, Path | None]:
    """All files under temporary names first, then all renamed, the card last: it never tells of a file that is not there yet.

    Returns the card's text, and where it is; None where a README.md that is not ours stands.
    """
    card = targets[0].parent / CARD
    ours = is_replaceable(card)
    with ExitStack() as stack:  # leaves in reverse: what is entered last is renamed first
        stack.enter_context(disk_errors(card))
        stack.enter_context(_folder(card.parent))
        temporary_card = stack.enter_context(replacing(card)) if ours else None
        files = []
        for target in targets:
            stack.enter_context(disk_errors(target))
            temporary = stack.enter_context(replacing(target))
            if target.suffix == ".onnx":
                temporary.write_bytes(built.onnx)
            else:
                _write_packed(built.packed, temporary, target)
            files.append(_file(target.name, temporary.read_bytes()))
        text = card_of(files)
        if temporary_card:
            temporary_card.write_text(text, encoding="utf-8", newline="\n")
    return text, card if ours else None


def _file(name: str, data: bytes) -> File:
    return File(name, len(data), hashlib.sha256(data).hexdigest())


def _write_packed(packed: nn.Module, temporary: Path, target: Path) -> None:
    try:
        save_packed(packed, temporary)
        _require_same(load(temporary), packed)
    except SimanError as error:  # it names the temporary file
        raise type(error)(str(error).replace(str(temporary), str(target))) from error


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder; what was made of it is taken away again when something fails."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]  # innermost first
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else put something there
                folder.rmdir()
        raise


def _require_same(loaded: nn.Module, packed: nn.Module) -> None:
    """What was written, read back, must be what was to be written."""
    if wrong := different_tensors(loaded, packed):
        raise MismatchError(f"the packed file is wrong, nothing was written: {wrong[0]}")


def _check_options(format: str, half: bool, int8: bool, with_preprocess: bool) -> None:
    if format not in FORMATS:
        raise InputError(f"--format {format!r}: expected one of {', '.join(FORMATS)}")
    if half and int8:
        raise InputError("--half and --int8 are two ways to store the same weights; choose one")
    if (int8 or with_preprocess) and format != "onnx":
        flag = "--int8" if int8 else "--with-preprocess"
        raise InputError(f"{flag} changes the ONNX graph; a .safetensors file has none: use --format onnx")


def _open(what: nn.Module | str | Path | None, runs: Path, which: Which) -> Subject:
    if isinstance(what, nn.Module):
        return Subject("the model", Path(), description_of(what), None, packed=copy.deepcopy(what))
    subject = open_subject(what, runs, which)
    if subject.packed is None:
        raise InputError(f"{subject.name} is an ONNX file already; export a run or a .safetensors file")
    return subject


def _targets(subject: Subject, format: Format, output: Path | None) -> tuple[Path, ...]:
    """The files to write; InputError for a place where they cannot be."""
    suffixes = SUFFIXES if format == "all" else (f".{format}",)
    if output is not None and output.suffix in SUFFIXES and not output.is_dir():
        if suffixes != (output.suffix,):
            meant = f"add --format {output.suffix[1:]}" if format != "all" else "leave the suffix out"
            raise InputError(f"--output {output} does not fit --format {format}: {meant}, or name a folder")
        targets: tuple[Path, ...] = (output,)
    else:
        folder = output or subject.folder
        targets = tuple(folder / f"model{suffix}" for suffix in suffixes)
    require_usable(targets[0].parent, None)
    if taken := [target for target in targets if target.is_dir()]:
        raise InputError(f"{taken[0]} is a folder, a file is to be written there; choose another --output")
    return targets
