"""`siman convert`: the flags, and the two ways to start: a new run, or `--resume`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from siman_convert import launch
from siman_convert.cli import complete
from siman_convert.cli.common import QUIET, RUNS, Device, Json, Output, Workers, megabytes, percent, print_json

if TYPE_CHECKING:
    from siman_convert.conversion import Result
    from siman_convert.runs import Run

START, TRAIN, DATA, MACHINE = (
    "What to convert",
    "Training (part of the recipe)",
    "Images (part of the recipe)",
    "Machine",
)


def _option(*names: str, panel: str = TRAIN, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **settings)


def convert(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="A timm model; `siman models` lists them.", autocompletion=complete.models
        ),
    ] = None,
    data: Annotated[
        str | None,
        _option(
            "--data",
            "--data-dir",
            panel=START,
            help="Images: a folder, IDX or CIFAR files, hfds/..., wds/..., tfds/..., or digits (the default).",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        _option(
            "--recipe",
            panel=START,
            help="A shipped recipe or a YAML file; without it: finetune.",
            autocompletion=complete.recipes,
        ),
    ] = None,
    assignments: Annotated[list[str], _option("--set", panel=START, help="key=value of any recipe field.")] = [],
    weights: Annotated[
        str | None,
        _option(
            "--weights", "--initial-checkpoint", panel=START, help="pretrained (the default), none, or a weights file."
        ),
    ] = None,
    resume: Annotated[
        str | None,
        _option(
            "--resume",
            panel=START,
            help="Go on with this run; `last` is the newest.",
            autocompletion=complete.resumable,
        ),
    ] = None,
    dry_run: Annotated[bool, _option("--dry-run", panel=START, help="Check everything, write nothing.")] = False,
    epochs: Annotated[int | None, _option(help="Binary epochs; 0: post-training mode.")] = None,
    fp_epochs: Annotated[int | None, _option(help="Full-precision epochs before the conversion.")] = None,
    batch_size: Annotated[int | None, _option("-b", "--batch-size", help="Images at a time, in each process.")] = None,
    grad_accum_steps: Annotated[int | None, _option(help="Batches per optimizer step.")] = None,
    opt: Annotated[str | None, _option(help="sgd or adamw.")] = None,
    lr: Annotated[
        float | None, _option(help="Learning rate; it is not scaled by the number of images or processes.")
    ] = None,
    fp_lr: Annotated[float | None, _option(help="Learning rate of the full-precision epochs.")] = None,
    momentum: Annotated[float | None, _option(help="Of sgd.")] = None,
    weight_decay: Annotated[float | None, _option(help="Never applied to binary layers.")] = None,
    warmup_epochs: Annotated[int | None, _option(help="Epochs of rising learning rate.")] = None,
    distill_weight: Annotated[float | None, _option(help="Weight of the teacher's answers; 0: off.")] = None,
    distill_temperature: Annotated[float | None, _option(help="Divides teacher's and student's logits.")] = None,
    feature_weight: Annotated[float | None, _option(help="Weight of where the teacher looks; 0: off.")] = None,
    label_weight: Annotated[float | None, _option(help="Weight of the labels beside a teacher.")] = None,
    teacher: Annotated[
        str | None, _option(help="NAME (timm's pretrained) or NAME=FILE; without it: the model before conversion.")
    ] = None,
    smoothing: Annotated[float | None, _option(help="Label smoothing.")] = None,
    mixup: Annotated[float | None, _option(help="Alpha of mixup; 0: off.")] = None,
    cutmix: Annotated[float | None, _option(help="Alpha of cutmix; 0: off.")] = None,
    clip_grad: Annotated[float | None, _option(help="Largest gradient norm.")] = None,
    model_ema: Annotated[bool | None, _option("--model-ema/--no-model-ema", help="Average the weights.")] = None,
    model_ema_decay: Annotated[float | None, _option(help="Of that average.")] = None,
    amp: Annotated[bool | None, _option("--amp/--no-amp", help="Mixed precision.")] = None,
    amp_dtype: Annotated[str | None, _option(help="bfloat16 or float16.")] = None,
    channels_last: Annotated[bool | None, _option("--channels-last/--no-channels-last", help="Memory format.")] = None,
    sync_bn: Annotated[
        bool | None, _option("--sync-bn/--no-sync-bn", help="BatchNorm over all processes' images, on GPUs.")
    ] = None,
    seed: Annotated[int | None, _option(help="Of everything random.")] = None,
    init: Annotated[str | None, _option(help="remap, copy or scratch: what latent weights start as.")] = None,
    binarizer: Annotated[str | None, _option(help="half, analytic or sign: how weights become bits.")] = None,
    shortcuts: Annotated[
        bool | None,
        _option("--shortcuts/--no-shortcuts", help="Identity around binary convolutions where shapes allow."),
    ] = None,
    prelu: Annotated[
        bool | None, _option("--prelu/--no-prelu", help="PReLU for ReLU behind binary convolutions.")
    ] = None,
    shifts: Annotated[
        bool | None, _option("--shifts/--no-shifts", help="Learned thresholds and shifts around PReLU; needs --prelu.")
    ] = None,
    keep: Annotated[list[str], _option(help="Glob of convolutions to keep in full precision.")] = [],
    binarize: Annotated[list[str], _option(help="Glob of convolutions to binarize all the same.")] = [],
    img_size: Annotated[int | None, _option(panel=DATA, help="Input height and width.")] = None,
    val_split: Annotated[
        float | None, _option(panel=DATA, help="Share held out of a single folder of classes.")
    ] = None,
    hflip: Annotated[float | None, _option(panel=DATA, help="Probability of a mirror image.")] = None,
    color_jitter: Annotated[float | None, _option(panel=DATA, help="Strength of colour jitter.")] = None,
    aa: Annotated[str | None, _option(panel=DATA, help="timm's auto-augment string.")] = None,
    reprob: Annotated[float | None, _option(panel=DATA, help="Probability of random erasing.")] = None,
    no_aug: Annotated[bool | None, _option("--no-aug", panel=DATA, help="No augmentation.")] = None,
    output: Output = RUNS,
    experiment: Annotated[str | None, _option(panel=MACHINE, help="Name of the run's folder.")] = None,
    device: Device = "auto",
    workers: Workers = 0,
    save_every: Annotated[
        float | None, _option(panel=MACHINE, min=0.0, help="Minutes between states saved within an epoch.")
    ] = None,
    track: Annotated[
        list[str], _option("--track", panel=MACHINE, help="tensorboard or wandb: show the run there while it trains.")
    ] = [],
    as_json: Json = False,
) -> None:
    """Convert a model and fine-tune it.

    Ctrl-C stops cleanly and prints the command that goes on.
    """
    from siman_convert.errors import InputError, Interrupted
    from siman_convert.names import require_data
    from siman_convert.recipe import Recipe, load_recipe, parse_assignments
    from siman_convert.runs import find_run

    flags = {
        name: value for name, value in ctx.params.items() if name in Recipe.model_fields and value not in (None, [])
    }
    overrides = {**parse_assignments(assignments), **flags}
    named = {"model": model, "data": data, "weights": weights, "experiment": experiment}
    if resume is None:
        if model is None:
            raise InputError("name a model to convert, for example `siman convert resnet18 --data PATH`")
        wanted = load_recipe(recipe or "finetune", overrides)
        require_data(data or "digits")
        if weights in (None, "pretrained"):
            _require_weights_in_reach(model)
    else:
        run = find_run(None if resume == "last" else resume, output)
        _refuse_changes(run, named, recipe, overrides)

    from siman_convert.cli.terminal import Terminal  # from here on torch: everything above answers at once
    from siman_convert.conversion import Options
    from siman_convert.conversion import convert as start
    from siman_convert.conversion import resume as go_on

    options = Options(output, experiment, device, workers, save_every, dry_run, tuple(track))
    with Terminal(aside=as_json, silent=not launch.is_main()) as terminal:
        try:
            if resume is None:
                assert model is not None
                result = start(
                    model,
                    data or "digits",
                    recipe=wanted,
                    weights=weights,
                    options=options,
                    watcher=terminal,
                )
            else:
                result = go_on(run, options=options, watcher=terminal)
        except Interrupted as error:
            raise Interrupted(f"{error}; {_again(error.run, device, workers, save_every, track)}") from None
    launch.leave()
    if not launch.is_main():
        return
    if as_json:
        print_json({"dry_run": True} if result is None else {**vars(result), "run": str(result.run)})
    elif result is None:
        terminal.say("dry run: nothing was written")
    else:
        _print_result(result)


def _again(run: Path | None, device: str, workers: int, save_every: float | None, track: list[str]) -> str:
    """The command that goes on, with the flags that are not part of the run."""
    if run is None:
        return "go on with: the same command"
    start = "go on, under the same launcher, with: -m siman_convert" if launch.processes() > 1 else "go on with: siman"
    flags = [("--device", device, "auto"), ("-j", workers, 0), ("--save-every", save_every, None)]
    flags += [("--track", name, None) for name in track]
    values = [f"{flag} {value}" for flag, value, usual in flags if value != usual]
    return " ".join([start, "convert --resume", shlex.quote(str(run)), *values])


def _require_weights_in_reach(model: str) -> None:
    """Say within seconds that pretrained weights cannot be had."""
    from siman_convert.hub import require_weights_in_reach
    from siman_convert.model_table import read_table

    on_timm_hub = {row["name"] for row in read_table() if row["timm_hub"]}
    if model in on_timm_hub:
        require_weights_in_reach(model)


def _refuse_changes(run: "Run", named: dict[str, str | None], recipe: str | None, overrides: dict[str, Any]) -> None:
    """A resumed run keeps its model, data and recipe: asking for another is an error that names what differs."""
    from siman_convert.errors import InputError
    from siman_convert.recipe import build_recipe, read_recipe_fields

    info, stored = run.info(), run.recipe().model_dump()
    own = {"model": info.model, "data": info.data, "weights": info.weights, "experiment": run.name}
    changes = [
        f"{key} is {own[key]}, not {value}"
        for key, value in named.items()
        if value is not None and own[key] not in (value, os.path.abspath(Path(value).expanduser()))  # noqa: PTH100
    ]
    asked = {**(read_recipe_fields(recipe) if recipe else {}), **overrides}
    wanted = build_recipe({**stored, **asked}, origin="--resume").model_dump()
    changes += [f"{key} is {stored[key]}, not {wanted[key]}" for key in stored if stored[key] != wanted[key]]
    if changes:
        raise InputError(
            f"{run.folder} was started otherwise ({'; '.join(changes[:3])}); resume it without these, or start a new run"
        )


def _print_result(result: "Result") -> None:
    size = f"{megabytes(result.bytes_before)} -> {megabytes(result.bytes_after)}"
    times = result.bytes_before / result.bytes_after
    print()
    print(f"full precision  top-1 {percent(result.full_precision_top1)}")
    print(
        f"binary          top-1 {percent(result.best_top1)} (epoch {result.best_epoch}; last weights {percent(result.last_top1)})"
    )
    print(f"weights         {size} when packed, {times:.1f} times smaller")
    if result.bad_images:
        print(f"unreadable      {result.bad_images} images skipped")
    print(f"run             {result.run}")
    if QUIET.get():
        return
    print()
    print(f"next: siman export {result.run}")
    print(f"      siman eval {result.run}")
