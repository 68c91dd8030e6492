"""What eval, predict, export and verify can be asked about: a run, a packed file, or an ONNX file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import safetensors.torch
from safetensors import SafetensorError
from torch import nn

from siman_convert.data import Preprocess, Source, open_source
from siman_convert.description import Accuracy, Description, describe, description_of
from siman_convert.environment import siman_version
from siman_convert.errors import InputError
from siman_convert.frozen import freeze
from siman_convert.models import create
from siman_convert.names import is_file, require_file
from siman_convert.onnx_file import OnnxFile, read_onnx
from siman_convert.packed import load
from siman_convert.runs import Record, Run, find_run
from siman_convert.surgery import apply_plan

Which = Literal["best", "last"]
READINGS = 20  # of a run that changes while it is read


@dataclass(frozen=True)
class Subject:
    """`name`: what to call it in a message. `folder`: where it lies. `run`: the run itself, or whose folder a file lies in.

    One of `packed` (a packed torch model) and `onnx` is set.
    """

    name: str
    folder: Path
    description: Description
    run: Run | None
    packed: nn.Module | None = None
    onnx: OnnxFile | None = None


def open_subject(what: str | Path | None, output: Path, which: Which = "best") -> Subject:
    """Open the file or the run of that name or path; None: the newest run in `output`. Raises InputError."""
    if what is not None and is_file(what):
        return open_file(Path(what))
    return run_subject(find_run(what, output), which)


def run_subject(run: Run, which: Which = "best") -> Subject:
    """A run's weights, packed. Raises InputError."""
    packed = packed_run(run, which)
    return Subject(str(run.folder), run.folder, description_of(packed), run, packed=packed)


def open_file(path: Path) -> Subject:
    """Open an exported file. Raises InputError."""
    require_file(path)
    run = Run(path.parent) if (path.parent / "run.json").is_file() else None
    if path.suffix == ".onnx":
        file = read_onnx(path)
        _require_described(file, path)
        return Subject(str(path), path.parent, file.description, run, onnx=file)
    packed = load(path)
    return Subject(str(path), path.parent, description_of(packed), run, packed=packed)


def _require_described(file: OnnxFile, path: Path) -> None:
    """InputError where the graph takes or gives something else than the description says."""
    (channels, height, width), classes = file.description.preprocess.input_size, len(file.description.classes)
    takes = (0, 0, 0, channels) if file.variant.takes_images else (0, channels, height, width)  # 0: any size
    graph = file.model.graph
    for values, wanted in ((graph.input, takes), (graph.output, (0, classes))):
        found = [tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in values]
        if found != [wanted]:
            raise InputError(f"{path}: its graph has shapes {found}, its metadata say {wanted}; export it again")


def packed_run(run: Run, which: Which = "best") -> nn.Module:
    """The packed form of a run's weights, described. Raises InputError."""
    info = run.info()
    trained, records = _weights_and_records(run, which)
    model = freeze(trained)
    description = Description(
        architecture=info.model,
        plan=run.plan(),
        preprocess=Preprocess.from_dict(info.preprocess),
        classes=info.classes,
        weights=which,
        recipe_digest=info.recipe_digest,
        accuracy=_accuracy(run, records, which),
        siman_version=siman_version(),
    )
    return describe(model, description)


def _weights_and_records(run: Run, which: Which) -> tuple[nn.Module, list[Record]]:
    """The model and metrics that belong to it, though both may be replaced by a training at this moment. Raises InputError."""
    for _ in range(READINGS):
        records = run.metrics()
        model = load_run_model(run, which)
        if run.metrics() == records and run.published(records):
            return model, records
        time.sleep(0.25)
    raise InputError(
        f"{run.folder}: its weights and metrics are not of one epoch: it was killed between the two, mend it with "
        f"`siman convert --resume {run.folder}`; or it is being trained with epochs of a second: wait"
    )


def _accuracy(run: Run, records: list[Record], which: Which) -> Accuracy | None:
    """What training measured for these weights; `siman eval` repeats it."""
    records = [record for record in records if record.get("phase") == "binary"]
    if not records:
        return None
    record = max(records, key=lambda record: record["top1"]) if which == "best" else records[-1]
    if not {"top5", "images"} <= record.keys():
        raise InputError(
            f"{run.folder / 'metrics.jsonl'}: malformed: expected top5 and images in every binary evaluation"
        )
    return Accuracy(record["top1"], record["top5"], record["images"], run.info().data_name)


def load_run_model(run: Run, which: str = "best") -> nn.Module:
    """The `best`, `last` or `full-precision` model of a run, trainable, in eval mode. Raises InputError."""
    info = run.info()
    path = run.weights(which)
    model = create(info.model, len(info.classes))
    if which != "full-precision":
        model = apply_plan(model, run.plan(), init="copy", selection=run.recipe().binarizer)
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
    except (RuntimeError, OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged or not this run's: {' '.join(str(error).split())[:160]}") from error
    return model.eval()


def open_run_data(run: Run, data: str | None = None) -> Source:
    """The data a run was made with, or `data` of the same classes instead; InputError when the classes differ."""
    info, recipe = run.info(), run.recipe()
    source = open_source(data or info.data, val_split=recipe.val_split, seed=recipe.seed)
    return _of_classes(source, info.classes, run.name)


def subject_data(subject: Subject, data: str | None) -> Source:
    """The images a subject can be tried on: `data`, else its run's. Raises InputError when it has other classes."""
    if subject.run is not None:
        return _of_classes(open_run_data(subject.run, data), subject.description.classes, subject.name)
    if data is None:
        raise InputError(f"{subject.name} does not say where images are; name some with --data")
    return _of_classes(open_source(data), subject.description.classes, subject.name)


def _of_classes(source: Source, classes: tuple[str, ...], name: str) -> Source:
    if source.classes != classes:
        raise InputError(
            f"{source.spec}: its {len(source.classes)} classes are not the {len(classes)} that {name} was trained on; "
            "expected the same names in the same order"
        )
    return source
