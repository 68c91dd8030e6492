"""The API reference, made from the docstrings.

python docs/build.py [FOLDER]       into build/docs, or the folder named
"""

import sys
from pathlib import Path

import pdoc

import siman_convert

# What users of the Python API meet; the rest is for those who read the code.
MODULES = (
    "binarize", "bits", "conversion", "errors", "exporting", "inspection", "layers", "metrics", "networks", "onnx_op", "packed",
    "plans", "recipe", "runs", "runtime", "topology", "verification", "watch",
)  # fmt: skip


def build(folder: Path) -> None:
    """Write the pages. Warnings are what pdoc finds wrong in a docstring."""
    for name in siman_convert.__all__:
        getattr(siman_convert, name)  # names are looked up when first used; pdoc reads only what is there
    pdoc.render.configure(docformat="markdown", math=False, show_source=True)
    pdoc.pdoc("siman_convert", *(f"siman_convert.{name}" for name in MODULES), output_directory=folder)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
