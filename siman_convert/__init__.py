"""siman: turn a pretrained timm CNN into a binary neural network (SiMaN, arXiv 2102.07981).

    plan(model)        what would become binary, and why        inspect: every convolution of any timm model
    convert(model, data)   convert and fine-tune into a run folder    resume(run)   go on with one
    evaluate(run)      top-1, top-5 and loss of a run

Importing this package imports neither torch nor timm; using a name does.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siman_convert.conversion import convert, evaluate, resume
    from siman_convert.errors import InputError, MismatchError, SimanError
    from siman_convert.plans import plan

__all__ = ["InputError", "MismatchError", "SimanError", "convert", "evaluate", "plan", "resume"]

_HOMES = {
    "convert": "conversion",
    "evaluate": "conversion",
    "plan": "plans",
    "resume": "conversion",
    "InputError": "errors",
    "MismatchError": "errors",
    "SimanError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'siman_convert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"siman_convert.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
