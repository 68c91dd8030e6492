"""What a SiMaN training step costs beside the full-precision step of the same network: seconds, and memory held for backward.

    python benchmarks/training_step.py                                        the four usual cases, some ten minutes
    python benchmarks/training_step.py --case siman_resnet20:32:128 --pairs 30 --json
    python benchmarks/training_step.py --device cuda --bf16 --channels-last --compile --case resnet18:224:256

Both networks train in this process on the same random images with the optimizer of a recipe (SGD with momentum unless --recipe
says otherwise) and take turns, so that what disturbs the machine disturbs both; the ratio is the median over pairs of
neighbouring steps, with its quartiles: once of the clock, and once of processor time, which other programs on the machine
touch less (with one thread and nothing else running the two agree). A step is clip (binary network only), forward, loss,
backward and update, as the trainer does them; reading images is not in it. On a GPU a step ends when the GPU has ended it.

Memory is what autograd holds for the backward pass when the forward pass is over: the storages that go through
`torch.autograd.graph.saved_tensors_hooks`, each counted once, parameters and buffers apart. What grows with the batch is
`activations`; what does not, such as weights made binary, is `constant`. It is counted, not timed: the same on every machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from siman_convert.environment import describe_environment
from siman_convert.evaluation import resolve_device
from siman_convert.models import create, require_known
from siman_convert.objective import Objective
from siman_convert.plans import make_plan
from siman_convert.recipe import Recipe, load_recipe
from siman_convert.schedule import make_optimizer
from siman_convert.surgery import apply_plan, binary_layers
from siman_convert.train import TrainingStep

MIB = 1 << 20
WARM_UP = 3  # steps that are not timed: they allocate, compile and choose algorithms
USUAL_CASES = ("siman_resnet20:32:128", "siman_resnet18:32:128", "resnet18:32:128", "resnet18:224:16")


class Case(NamedTuple):
    """A network, the side of its square images and how many make a batch."""

    model: str
    img_size: int
    batch_size: int


class Memory(NamedTuple):
    """Bytes that autograd holds of one forward pass; `activations` for the whole batch."""

    activations: int
    constant: int


class Times(NamedTuple):
    """Median milliseconds of a step, and the ratios of pairs of steps, SiMaN over full precision: median and quartiles."""

    full_precision_ms: float
    siman_ms: float
    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: np.ndarray) -> Times:
        """Of pairs (pairs, 2): full precision, SiMaN."""
        full, siman = 1e3 * np.median(seconds, axis=0)
        low, median, high = np.percentile(seconds[:, 1] / seconds[:, 0], [25, 50, 75])
        return cls(float(full), float(siman), float(median), float(low), float(high))


class Row(NamedTuple):
    """One case: its times by the clock and of the processor, and the memory of both networks."""

    case: Case
    clock: Times
    processor: Times
    full_precision_memory: Memory
    siman_memory: Memory
    activation_ratio: float


class Setting(NamedTuple):
    """Where and how both networks are trained."""

    device: torch.device
    recipe: Recipe  # its optimizer, binarizer, clip, memory format and mixed precision
    compiled: bool  # by torch.compile: forward, loss and backward

    def autocast(self) -> torch.autocast:
        """Mixed precision where the recipe has it; else nothing."""
        return torch.autocast(self.device.type, getattr(torch, self.recipe.amp_dtype), enabled=self.recipe.amp)


class Trainee:
    """A network in training, one step at a time."""

    def __init__(self, model: nn.Module, setting: Setting) -> None:
        recipe = setting.recipe
        layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.setting = setting
        self.step = TrainingStep(model, Objective()).train().to(setting.device, memory_format=layout)
        self.run = torch.compile(self.step) if setting.compiled else self.step
        self.optimizer = make_optimizer(model, recipe, recipe.lr)
        self.layers = list(binary_layers(model).values())

    def seconds(self, images: Tensor, targets: Tensor) -> tuple[float, float]:
        """Of one whole step, by the clock and of the processor."""
        started = perf_counter(), process_time()
        for layer in self.layers:
            layer.clip_weights_(self.setting.recipe.clip_percent)
        with self.setting.autocast():
            loss = self.run(images, targets)[0]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - started[0], process_time() - started[1]

    def memory(self, case: Case) -> Memory:
        """From the bytes of two and of four images: what one adds, and the rest."""
        two, four = (self._saved_bytes(*make_batch(case, images, self.setting)) for images in (2, 4))
        return Memory((four - two) // 2 * case.batch_size, 2 * two - four)

    def _saved_bytes(self, images: Tensor, targets: Tensor) -> int:
        own = {t.untyped_storage().data_ptr() for t in (*self.step.parameters(), *self.step.buffers())}
        saved: dict[int, int] = {}  # address of a storage -> bytes; none is freed while the loss is there

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), self.setting.autocast():
            loss, _logits = self.step(images, targets)
        total = sum(saved.values())
        del loss
        return total


def make_batch(case: Case, images: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, H, W) and targets (N,), the same every time."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, 3, case.img_size, case.img_size)
    pixels, targets = torch.randn(shape, generator=generator), torch.randint(10, (images,), generator=generator)
    layout = torch.channels_last if setting.recipe.channels_last else torch.contiguous_format
    return pixels.to(setting.device, memory_format=layout), targets.to(setting.device)


def measure(case: Case, pairs: int, setting: Setting) -> Row:
    """Both networks of a case, in turns."""
    torch.manual_seed(0)
    model = create(case.model, 10)
    converted = apply_plan(copy.deepcopy(model), make_plan(model), selection=setting.recipe.binarizer)
    full_precision, binary = Trainee(model, setting), Trainee(converted, setting)
    memories = full_precision.memory(case), binary.memory(case)
    images, targets = make_batch(case, case.batch_size, setting)
    for trainee in (full_precision, binary):
        for _ in range(WARM_UP):
            trainee.seconds(images, targets)
    times = np.array([_pair(full_precision, binary, images, targets, i % 2 == 1) for i in range(pairs)])
    by_clock, of_processor = Times.of(times[:, :, 0]), Times.of(times[:, :, 1])
    return Row(case, by_clock, of_processor, *memories, memories[1].activations / memories[0].activations)


def _pair(
    first: Trainee, second: Trainee, images: Tensor, targets: Tensor, swapped: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of a step of each; whoever goes first finds the caches as the pair before left them."""
    if swapped:
        return _pair(second, first, images, targets, False)[::-1]
    return first.seconds(images, targets), second.seconds(images, targets)


def table(rows: Sequence[Row]) -> str:
    """Six lines a case."""
    lines = []
    for row in rows:
        lines.append(f"{row.case.model}, {row.case.img_size}x{row.case.img_size}, batch {row.case.batch_size}")
        for name, times in (("clock", row.clock), ("processor", row.processor)):
            lines.append(
                f"  {name:<12}{times.full_precision_ms:9.0f} ms -> {times.siman_ms:9.0f} ms"
                f"   ratio {times.ratio:.2f} (quartiles {times.low:.2f} - {times.high:.2f})"
            )
        rates = (1e3 * row.case.batch_size / ms for ms in (row.clock.full_precision_ms, row.clock.siman_ms))
        lines.append("  {:<12}{:9.0f} /s -> {:9.0f} /s".format("images", *rates))
        for name in Memory._fields:
            full, siman = (getattr(memory, name) for memory in (row.full_precision_memory, row.siman_memory))
            ratio = f"   ratio {row.activation_ratio:.3f}" if name == "activations" else ""
            lines.append(f"  {name:<12}{full / MIB:9.1f} MiB -> {siman / MIB:8.1f} MiB{ratio}")
    return "\n".join(lines)


def as_json(row: Row) -> dict[str, Any]:
    """Dicts and numbers only."""
    return {name: value._asdict() if isinstance(value, tuple) else value for name, value in row._asdict().items()}


def parse_case(text: str) -> Case:
    """`model:image side:batch`, for example resnet18:224:32."""
    name, *numbers = text.split(":")
    if len(numbers) != 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected MODEL:SIDE:BATCH, for example resnet18:224:32")
    require_known(name)
    return Case(name, int(numbers[0]), int(numbers[1]))


def main(arguments: Sequence[str] | None = None, write: Callable[[str], Any] = print) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", type=parse_case, metavar="MODEL:SIDE:BATCH", help="may be repeated")
    parser.add_argument("--pairs", type=int, default=15, help="of steps that are compared (default 15)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--recipe", help="name or file; its optimizer, binarizer, clip, layout and precision are used")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--bf16", action="store_true", help="mixed precision in bfloat16, whatever the recipe says")
    parser.add_argument("--channels-last", action="store_true", help="whatever the recipe says")
    parser.add_argument("--compile", action="store_true", help="both networks by torch.compile")
    parser.add_argument("--json", action="store_true", help="a JSON document instead of the table")
    options = parser.parse_args(arguments)
    recipe = load_recipe(options.recipe) if options.recipe else Recipe()
    asked = {"amp": options.bf16, "channels_last": options.channels_last}
    recipe = recipe.model_copy(update={name: True for name, value in asked.items() if value})
    setting = Setting(resolve_device(options.device), recipe, options.compile)
    torch.set_num_threads(options.threads)
    cases = options.case or [parse_case(text) for text in USUAL_CASES]
    rows = [measure(case, options.pairs, setting) for case in cases]
    if options.json:
        about = {"torch": torch.__version__, "machine": platform.machine(), "threads": options.threads}
        about["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        about["device"] = describe_environment(setting.device)["device"]
        how = {"compile": options.compile, "amp": recipe.amp, "channels_last": recipe.channels_last}
        write(json.dumps({**about, **how, "pairs": options.pairs, "cases": [as_json(row) for row in rows]}, indent=1))
    else:
        write(table(rows))


if __name__ == "__main__":
    main()
