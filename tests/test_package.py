"""What holds the package together: light imports, layers that import one way, a wheel that works from an empty folder."""

import ast
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import siman_convert

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "siman_convert"
ORDER = [
    "errors", "launch", "hub", "files", "pieces", "shared_library", "training_kernels", "binarize", "bits", "timm_convs",
    "layers", "blocks", "environment", "recipe",
    "trace", "topology", "plans", "surgery", "costs", "networks", "model_table", "drafts", "runs", "names", "data", "guards",
    "onnx_op", "onnx_quantized_op", "runtime", "metrics", "models", "frozen", "description", "metadata", "packed",
    "onnx_fold", "onnx_file", "onnx_preprocess", "onnx_int8_plan", "onnx_int8_conv", "onnx_int8", "onnx_export", "subjects",
    "backends", "watch", "tracking", "flips", "calibrate", "objective", "schedule", "train", "evaluation", "operator_check",
    "verification", "prediction", "snippet", "card", "publishing", "exporting", "benchmark", "inspection", "report", "duration",
    "trial", "preparation", "conversion", "doctor", "cli",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    """Top-level modules of ours that a file imports, functions' own imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("siman_convert"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


def test_modules_import_only_what_stands_above_them() -> None:
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module not in ("__init__", "__main__"):
            assert module in ORDER, f"{module} has no place in the order"
            below = {name for name in imported(path) if ORDER.index(name) > ORDER.index(module)}
            assert not below, f"{path.name} imports {below}, which stand below it"


def test_starting_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, siman_convert.cli; print([m for m in ('torch', 'timm', 'numpy', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("arguments", [["recipes", "ls"], ["models", "resnet18"], ["runs"], ["--version"]])
def test_light_commands_import_neither_torch_nor_timm(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from siman_convert.cli import run; code = run(sys.argv[1:]);"
        "sys.exit(code or [m for m in ('torch', 'timm') if m in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        *([command, "nothere"] for command in ("eval", "export", "bench", "verify", "report")),
        ["eval"],
        ["eval", "nothere.onnx"],
        ["predict", "nothere", "photo.jpg"],
        ["convert", "resnet18", "--data", "nothere"],
        ["convert", "--resume", "nothere"],
    ],
    ids=" ".join,
)
def test_what_is_not_there_is_answered_without_torch(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys; from siman_convert.cli import run; code = run(sys.argv[1:]);"
        "sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothere" in done.stderr or "no run in runs" in done.stderr


def test_public_names() -> None:
    for name in siman_convert.__all__:
        assert getattr(siman_convert, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        siman_convert.nonsense  # noqa: B018


@pytest.mark.slow
def test_an_installed_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Built from the checkout, installed without it in sight; the dependencies are those of this environment."""
    wheels, environment, empty = tmp_path / "wheels", tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True, timeout=300)
    (wheel,) = wheels.glob("siman_convert-*-py3-none-*.whl")
    venv.create(environment, with_pip=False)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    target = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run([*pip, "install", "--no-deps", "--target", target, str(wheel)], check=True, timeout=300)
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (Path(target) / "dependencies.pth").write_text(ours + "\n")

    def siman(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-m", "siman_convert", *arguments], cwd=empty, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [python, "-c", "import siman_convert; print(siman_convert.__file__)"], cwd=empty, capture_output=True, text=True
    )
    assert where.stdout.startswith(target), where
    assert "finetune" in siman("recipes", "ls")
    assert "resnet18" in siman("models", "resnet18")
    fast = [
        "--weights", "none", "--epochs", "1", "--img-size", "32", "--set", "calibration_images=64", "--device", "cpu",
    ]  # fmt: skip
    siman("convert", "test_resnet", "--data", "digits", *fast)
    assert json.loads(siman("eval", "--json", "--device", "cpu"))["images"] == 359
