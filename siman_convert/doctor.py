"""What siman stands on here, and what is wrong with it: for `siman doctor` and bug reports.

Every check stands by itself, since a package that cannot even be imported is what one asks a doctor about. Nothing that is
told names a home folder, a user or a machine, or holds a secret.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siman_convert.environment import PACKAGES, processor, version_of
from siman_convert.errors import InputError, one_line

OPTIONAL = ("onnxscript", "huggingface-hub", "openvino", "tensorboard", "wandb", "datasets", "webdataset")
FEATURES = (  # as Linux names them: what the kernels, or OpenVINO beside them, can use
    "popcnt", "avx2", "fma", "avx512f", "avx512bw", "avx512_vpopcntdq", "avx512_vnni", "avx_vnni", "amx_int8",
    "asimd", "asimddp", "sve", "i8mm",
)  # fmt: skip
SETTINGS = (
    "SIMAN_ISA", "SIMAN_DEBUG", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET",
    "NO_COLOR", "FORCE_COLOR",
)  # fmt: skip  # variables whose values may be shown; of HF_TOKEN and the like only that they are set
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHARED = 2 << 30, 2 << 30, 256 << 20  # bytes
_HOME = re.compile(r"/(?:home|Users)/[^/\s'\":,;)]+|/root(?![\w-])|[A-Z]:\\Users\\[^\\\s]+")


@dataclass(frozen=True)
class Problem:
    """What is wrong and what to do. serious: siman cannot be used as it is."""

    what: str
    mend: str
    serious: bool = False


@dataclass
class Report:
    """Facts as lines by topic, in order, and problems."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not any(problem.serious for problem in self.problems)


def examine(runs: Path = Path("runs")) -> Report:
    """Run all checks; takes a few seconds. runs: the folder that runs are written to."""
    report = Report()
    checks: tuple[Callable[[Report], None], ...] = (
        _versions, _processor, _torch, _kernels, _memory, lambda report: _disk(report, runs), _caches, _settings,
    )  # fmt: skip
    for check in checks:
        check(report)
    report.facts = {topic: anonymous(text) for topic, text in report.facts.items()}
    report.problems = [Problem(anonymous(p.what), anonymous(p.mend), p.serious) for p in report.problems]
    return report


def anonymous(text: str) -> str:
    """The text on one line, without home folders."""
    own = re.escape(str(Path.home())) + r"(?![\w-])"
    return _HOME.sub("~", re.sub(own, "~", one_line(text)))


def _versions(report: Report) -> None:
    found = {name: version_of(name) for name in (*PACKAGES, *OPTIONAL)}
    report.facts["siman"] = found.pop("siman-convert")
    report.facts["python"] = f"{platform.python_version()} ({platform.python_implementation()})"
    libc = " ".join(platform.libc_ver()).strip()
    report.facts["system"] = f"{_system()}, {platform.machine()}{f', {libc}' if libc else ''}"
    report.facts["packages"] = ", ".join(f"{name} {version}" for name, version in found.items() if version != "unknown")
    absent = [name for name in OPTIONAL if found[name] == "unknown"]
    report.facts["not installed"] = ", ".join(absent) or "nothing"
    for name in PACKAGES[1:]:
        if found[name] == "unknown":
            report.problems.append(Problem(f"{name} is not installed", f"pip install {name}", serious=True))


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):  # not Linux
        return f"{platform.system()} {platform.release()}"


def _processor(report: Report) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    report.facts["processor"] = f"{processor()}; {cores} usable of {os.cpu_count()} threads"
    known = _cpu_flags()
    report.facts["features"] = " ".join(name for name in FEATURES if name in known) or "not known here"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def _torch(report: Report) -> None:
    try:
        import torch
        import torchvision  # noqa: F401  where its build does not fit torch's, importing it fails
    except Exception as error:
        mend = "reinstall torch and torchvision of one release: pip install --force-reinstall torch torchvision"
        report.problems.append(Problem(f"torch cannot be imported: {error}", mend, serious=True))
        report.facts["accelerators"] = "not known without torch"
        return
    found = [_gpu(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())]
    found += ["Apple GPU (mps), which siman does not use"] if torch.backends.mps.is_available() else []
    report.facts["accelerators"] = "; ".join(found) or "none"
    report.facts["torch"] = f"CUDA {torch.version.cuda or 'none'}, {torch.get_num_threads()} threads"
    if Path("/dev/nvidia0").exists() and not torch.cuda.is_available():
        what = "there is an NVIDIA GPU that torch cannot use"
        mend = "install a torch built for CUDA that fits the driver (`nvidia-smi` shows it), or train with --device cpu"
        report.problems.append(Problem(what, mend))


def _gpu(properties: Any) -> str:
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
    )


def _kernels(report: Report) -> None:
    """A one-layer graph, run as siman runs it, must give the reference's bits; so must stock ONNX Runtime."""
    try:
        from siman_convert.runtime import native
    except Exception as error:
        mend = "pip install --force-reinstall onnxruntime"
        report.problems.append(Problem(f"ONNX Runtime cannot be imported: {error}", mend, serious=True))
        return
    try:
        known, chosen = native.variants(), native.variant()
    except InputError as error:
        report.problems.append(Problem(str(error), f"unset {native.ISA}", serious=True))
        chosen = None
    except OSError as error:
        mend = "pip install --force-reinstall --no-deps siman-convert, on this machine"
        report.problems.append(Problem(f"the kernel library cannot be loaded: {error}", mend, serious=True))
        known, chosen = {}, None
    else:
        text = ", ".join(name + ("" if usable else " (not this processor)") for name, usable in known.items())
        report.facts["kernels"] = f"{chosen}, of {text}" if known else "none: the library was not built"
        if not known:
            report.problems.append(Problem(native.MISSING.partition("; ")[0], native.MISSING.partition("; ")[2]))
    results = {"stock": _sample(False)} | ({"with our kernels": _sample(True)} if chosen else {})
    wrong = {name: text for name, text in results.items() if text != "equal"}
    report.facts["ONNX Runtime"] = "; ".join(f"{name}: {text}" for name, text in results.items())
    for name, text in wrong.items():
        mend = (
            "try SIMAN_ISA=scalar, and report this" if name != "stock" else "pip install --force-reinstall onnxruntime"
        )
        report.problems.append(Problem(f"a small graph in ONNX Runtime, {name}: {text}", mend, serious=True))


def _sample(use_kernels: bool) -> str:
    """What becomes of one siman.BinaryConv2d: "equal" where it has the reference's bits."""
    try:
        import numpy as np

        from siman_convert.onnx_op import sample_model
        from siman_convert.runtime import native, reference

        model = sample_model()
        images = np.random.default_rng(0).normal(size=(2, 40, 9, 7)).astype(np.float32)
        expected: Any = reference.evaluator(model).run(None, {"X": images})
        found: Any = native.open_session(model.SerializeToString(), use_kernels=use_kernels).run(None, {"X": images})
        return "equal" if np.array_equal(found[0], expected[0]) else "other values than the reference's"
    except Exception as error:
        return f"failed: {error}"


def _memory(report: Report) -> None:
    total, free = _meminfo()
    if total:
        report.facts["memory"] = f"{_gib(total)}, {_gib(free)} free"
        if free < LITTLE_MEMORY:
            report.problems.append(
                Problem(f"only {_gib(free)} of memory are free", "a smaller --batch-size, or end other programs")
            )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        report.facts["shared memory"] = _gib(size)
        if size < LITTLE_SHARED:
            mend = "start the container with --shm-size 1g, or train with -j 0"
            report.problems.append(
                Problem(f"only {size >> 20} MiB of shared memory, through which images are loaded", mend)
            )


def _meminfo() -> tuple[int, int]:
    """Bytes of memory in all and free; zeros where the system does not tell. A container's limit counts."""
    try:
        lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        sizes = {line[0]: int(line[1]) << 10 for line in lines}
        total, free = sizes["MemTotal:"], sizes["MemAvailable:"]
    except (OSError, KeyError, ValueError):
        return 0, 0
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        return min(total, limit), min(free, max(0, limit - used))
    except (OSError, ValueError):  # "max": no limit
        return total, free


def _disk(report: Report, runs: Path) -> None:
    parts = []
    for name, place in (("runs", runs.absolute()), ("temporary files", Path(tempfile.gettempdir()))):
        place = next(path for path in (place, *place.parents) if path.exists())
        free = shutil.disk_usage(place).free
        parts.append(f"{name}: {_gib(free)} free{'' if os.access(place, os.W_OK) else ', not writable'}")
        if free < LITTLE_DISK:
            report.problems.append(
                Problem(f"only {_gib(free)} are free for {name} at {place}", "make room, or name another --output")
            )
        if not os.access(place, os.W_OK):
            report.problems.append(
                Problem(f"{place} cannot be written to", "name another --output, or work in another folder")
            )
    report.facts["disk"] = "; ".join(parts)


def _caches(report: Report) -> None:
    """The hub's: pretrained weights. Whether the hub answers, and whether somebody is logged in there, is told; not who."""
    try:
        from huggingface_hub import constants, get_token

        from siman_convert.hub import answers
    except Exception as error:
        report.problems.append(
            Problem(
                f"huggingface_hub cannot be imported: {error}", "pip install --force-reinstall huggingface_hub", True
            )
        )
        return
    folder = Path(constants.HF_HUB_CACHE)
    blobs = [path.stat().st_size for path in folder.glob("models--timm--*/blobs/*") if path.is_file()]
    models = len(list(folder.glob("models--timm--*")))
    report.facts["cache"] = f"{models} models of timm, {sum(blobs) / 1e6:.0f} MB, in {folder}"
    offline = constants.HF_HUB_OFFLINE
    reached = (
        "not to be asked (HF_HUB_OFFLINE)"
        if offline
        else "answers"
        if answers(constants.ENDPOINT)
        else "does not answer"
    )
    report.facts["hub"] = f"{reached}; {'logged in' if get_token() else 'not logged in'}"
    if not offline and reached != "answers":
        mend = "weights that are not in the cache need it; without it: --weights FILE or --weights none"
        report.problems.append(Problem("the Hugging Face hub, where pretrained weights are, does not answer", mend))


def _settings(report: Report) -> None:
    shown = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    hidden = [name for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HOME", "WANDB_API_KEY") if name in os.environ]
    report.facts["variables"] = (
        ", ".join([*shown, *(f"{name} is set" for name in hidden)]) or "none of those that matter"
    )


def bug_report(report: Report) -> Iterator[str]:
    """Plain lines to paste."""
    width = max(map(len, report.facts))
    yield from (f"{topic:{width}}  {text}" for topic, text in report.facts.items())
    yield from (f"{'problem':{width}}  {problem.what}" for problem in report.problems)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
