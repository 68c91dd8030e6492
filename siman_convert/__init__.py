"""siman: turn a pretrained timm CNN into a binary neural network (SiMaN, arXiv 2102.07981).

    plan(model)            what would become binary, and why
    convert(model, data)   convert and fine-tune, into a run folder
    resume(run)            go on with a run that was stopped
    evaluate(run)          top-1, top-5 and loss of a run or an exported file
    export(run)            one file: model.onnx or model.safetensors
    load(path)             model.safetensors as a torch module
    session(path)          an ONNX Runtime session with the native kernels
    verify(path)           whether an exported file computes what the network does

Importing this package imports neither torch nor timm; using a name does. From images to a file and back:

>>> import siman_convert
>>> from siman_convert.recipe import load_recipe
>>> recipe = load_recipe("demo", {"fp_epochs": 1, "epochs": 1})
>>> result = siman_convert.convert("test_resnet", "digits", weights="none", recipe=recipe)
>>> exported = siman_convert.export(result.run, format="all")
>>> siman_convert.evaluate(result.run).images
359
>>> [check.failures for check in siman_convert.verify(result.run, images=4).values()]  # of model.onnx, model.safetensors
[[], []]
>>> siman_convert.session(result.run / "model.onnx").get_inputs()[0].shape
['batch', 3, 32, 32]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siman_convert.conversion import convert, resume
    from siman_convert.errors import InputError, MismatchError, SimanError
    from siman_convert.evaluation import evaluate
    from siman_convert.exporting import export
    from siman_convert.inspection import plan
    from siman_convert.packed import load
    from siman_convert.runtime.native import session
    from siman_convert.verification import verify

__all__ = [
    "InputError",
    "MismatchError",
    "SimanError",
    "convert",
    "evaluate",
    "export",
    "load",
    "plan",
    "resume",
    "session",
    "verify",
]

_HOMES = {  # public name -> module and name there
    "convert": ("conversion", "convert"),
    "evaluate": ("evaluation", "evaluate"),
    "export": ("exporting", "export"),
    "load": ("packed", "load"),
    "session": ("runtime.native", "session"),
    "verify": ("verification", "verify"),
    "plan": ("inspection", "plan"),
    "resume": ("conversion", "resume"),
    "InputError": ("errors", "InputError"),
    "MismatchError": ("errors", "MismatchError"),
    "SimanError": ("errors", "SimanError"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'siman_convert' has no attribute {name!r}")
    module, inner = _HOMES[name]
    return globals().setdefault(name, getattr(importlib.import_module(f"siman_convert.{module}"), inner))


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
