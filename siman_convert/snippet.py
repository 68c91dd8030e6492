"""How to run an exported file: a few lines of Python, and where other languages start."""

from __future__ import annotations

from pathlib import Path

from siman_convert.data import Preprocess
from siman_convert.description import Description
from siman_convert.onnx_file import Variant

_HOSTS = """\
With siman installed, siman_convert.session(path) is the same session with the native kernels.
C++         the onnxruntime release for your platform: Ort::Session(env, "model.onnx", options)
C#          dotnet add package Microsoft.ML.OnnxRuntime: new InferenceSession("model.onnx")
JavaScript  npm install onnxruntime-node, or onnxruntime-web in a browser: InferenceSession.create("model.onnx")
The metadata key `siman` holds preprocessing, class names and accuracy as JSON."""


def snippet(path: Path, description: Description, variant: Variant) -> str:
    """What to print after an export; the Python part is complete but for the image's name."""
    code = _indented(python_lines(path, description, variant))
    if path.suffix == ".safetensors":
        return f"In Python, as a torch module:\n\n{code}"
    return f"In Python, with pip install onnxruntime pillow:\n\n{code}\n\n{_HOSTS}"


def python_lines(path: Path, description: Description, variant: Variant) -> list[str]:
    """Python that prints the class of photo.jpg."""
    if path.suffix == ".safetensors":
        return _torch_lines(path)
    return _image_lines(path, description.preprocess) if variant.takes_images else _lines(path, description.preprocess)


def _lines(path: Path, pre: Preprocess) -> list[str]:
    values = ".transpose(2, 0, 1)" if pre.input_size[0] == 3 else "[None]"
    return [
        "import json, numpy as np, onnxruntime",
        "from PIL import Image, ImageOps",
        *_session(path),
        f"image = {_fitted(pre)}",
        f"x = ((np.asarray(image, np.float32) / 255 - {_constant(pre.mean)}) / {_constant(pre.std)}){values}[None]",
        'print(classes[session.run(None, {"input": x.astype(np.float32)})[0].argmax()])',
    ]


def _image_lines(path: Path, pre: Preprocess) -> list[str]:
    return [
        "import json, numpy as np, onnxruntime",
        "from PIL import Image",
        *_session(path),
        f'image = Image.open("photo.jpg").convert({_mode(pre)!r})',
        "x = np.asarray(image)" + ("[None]" if pre.input_size[0] == 3 else "[None, :, :, None]"),
        'print(classes[session.run(None, {"images": x})[0].argmax()])',
    ]


def _session(path: Path) -> list[str]:
    return [
        f"session = onnxruntime.InferenceSession({str(path)!r})",
        'classes = json.loads(session.get_modelmeta().custom_metadata_map["siman"])["classes"]',
    ]


def _torch_lines(path: Path) -> list[str]:
    return [
        "import siman_convert, torch",
        "from PIL import Image",
        "from siman_convert.data import eval_transform",
        f"model = siman_convert.load({str(path)!r})",
        'x = eval_transform(model.siman_description.preprocess)(Image.open("photo.jpg"))[None]',
        "print(model.siman_description.classes[model(x).argmax()])",
    ]


def _fitted(pre: Preprocess) -> str:
    """Resize and central crop in one step; Pillow's pixels differ from evaluation's two steps by a rounding."""
    _, height, width = pre.input_size
    opened, how = f'Image.open("photo.jpg").convert({_mode(pre)!r})', f"Image.Resampling.{pre.interpolation.upper()}"
    if pre.crop_mode == "center":
        return f"ImageOps.fit({opened}, ({width}, {height}), {how}, bleed={(1 - pre.crop_pct) / 2:g})"
    return f"{opened}.resize(({width}, {height}), {how})"


def _constant(values: tuple[float, ...]) -> str:
    return str([float(f"{value:.8g}") for value in values]) if len(values) > 1 else f"{values[0]:.8g}"


def _mode(pre: Preprocess) -> str:
    return "RGB" if pre.input_size[0] == 3 else "L"


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)
