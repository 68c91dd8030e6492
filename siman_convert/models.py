"""A timm model by name, with weights from timm's hub, from a file, or none; every failure is one line.

The networks of the paper are registered with timm here (`networks`).
"""

import contextlib
import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg
from timm.models import load_state_dict as load_timm_state_dict
from torch import Tensor, nn

from siman_convert import networks
from siman_convert.errors import InputError
from siman_convert.hub import WAYS_OUT, require_answer


@dataclass(frozen=True)
class LoadedModel:
    """A full-precision model ready to be planned. `weights`: what to give `load_model` to load them again;
    `new_head`: its classifier was drawn at random for these classes."""

    module: nn.Module
    name: str
    weights: str  # "none", a file's name, or the pretrained tag
    new_head: bool


def load_model(name: str, classes: int, weights: str = "pretrained") -> LoadedModel:
    """Create timm model `name` for `classes` classes.

    `weights`: "pretrained" (timm's, from its cache or hub), "none" (random), or a path to a .safetensors or .pth file.
    Raises InputError for an unknown model, unreachable or absent weights, and files that do not fit the model.
    """
    require_known(name)
    require_weights(name, weights)
    if weights == "none":
        return LoadedModel(create(name, classes), name, "none", new_head=True)
    if weights == "pretrained":
        return _pretrained(name, classes)
    model = create(name, classes)
    new_head = _load_file(model, Path(weights))
    return LoadedModel(model, name, str(Path(weights).absolute()), new_head)


def create(name: str, classes: int | None, **kwargs: Any) -> nn.Module:
    """timm's model `name` for so many classes (None: its own number), random weights unless kwargs say otherwise.

    Raises InputError for a name that timm does not know itself: of others (hf-hub:, local-dir:) it would read configuration.
    """
    require_known(name)
    head = {} if classes is None else {"num_classes": classes}
    model: nn.Module = timm.create_model(name, **head, **kwargs)
    return model


def usual_weights(name: str) -> str:
    """The weights of a model when nobody says which: pretrained, or none for the paper's networks, which have no others."""
    return "none" if name in networks.__all__ else "pretrained"


def require_known(name: str) -> None:
    """Raise InputError with close matches unless timm knows the architecture (`resnet18` or `resnet18.a1_in1k`)."""
    base, _, tag = name.partition(".")
    if timm.is_model(base):
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise InputError(f"unknown weights {tag!r} of {base}; timm has {', '.join(tags) or 'none'}")
        return
    matches = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(matches)}?" if matches else "`siman models PATTERN` lists them"
    raise InputError(f"unknown model {name!r}: timm has no such architecture; {hint}")


def require_weights(name: str, weights: str) -> None:
    """Raise InputError at once where `load_model` could not get the weights: no file, no cached copy and no connection."""
    if weights == "pretrained":
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.has_weights:
            raise InputError(f"{name}: timm has no pretrained weights for it; {WAYS_OUT}")
        if _cached_file(cfg) is None:
            require_answer(name, huggingface_hub.constants.ENDPOINT if cfg.hf_hub_id else str(cfg.url))
    elif weights != "none":
        _require_file(Path(weights))


def _pretrained(name: str, classes: int) -> LoadedModel:
    cfg = get_pretrained_cfg(name)
    cached = _cached_file(cfg)
    overlay = {} if cached is None else {"file": cached}
    with _quiet_hub():
        try:
            model = create(name, classes, pretrained=True, pretrained_cfg_overlay=overlay)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{name}: pretrained weights cannot be had ({reason}); {WAYS_OUT}") from error
    return LoadedModel(model, name, "pretrained", new_head=classes != cfg.num_classes)


def _cached_file(cfg: Any) -> str | None:
    """The weights' file in the hub's local cache: asking the hub first would cost half a minute of retries offline."""
    names = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file_name in names if cfg.hf_hub_id else []:
        found = huggingface_hub.try_to_load_from_cache(cfg.hf_hub_id, file_name)
        if isinstance(found, str):
            return found
    return None


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """Silence the hub library's and timm's own warnings while they retry; what fails is reported once, by us."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "timm")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _load_file(model: nn.Module, path: Path) -> bool:
    """Load a checkpoint into `model`; returns whether the classifier did not fit and keeps its random weights."""
    state = read_state_dict(path)
    heads = _classifier_names(model)
    own = model.state_dict()
    head_keys = {key for key in own if any(key.startswith(f"{head}.") for head in heads)}
    new_head = any(key not in state or state[key].shape != own[key].shape for key in head_keys)
    if new_head:
        state = {key: value for key, value in state.items() if key not in head_keys}
    expected = own.keys() - (head_keys if new_head else set())
    _require_fit(path, state, {key: own[key] for key in expected})
    model.load_state_dict(state, strict=False)
    return new_head


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors or torch file, nothing unpickled but tensors. Raises InputError."""
    _require_file(path)
    try:
        state = load_timm_state_dict(str(path), weights_only=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError) as error:
        text = "it holds more than tensors" if "weights_only" in str(error) else " ".join(str(error).split())[:160]
        reason = f"{type(error).__name__}: {text}"
        raise InputError(f"{path}: not a weights file that can be read safely ({reason})") from error
    except Exception as error:  # pickle's errors share no base class with the rest
        raise InputError(f"{path}: not a weights file that can be read safely ({type(error).__name__})") from error
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path}: holds no tensors; expected a state dict of the model")
    ruined = [key for key, value in tensors.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if ruined:
        raise InputError(f"{path}: {ruined[0]} holds values that are not finite; these weights cannot be used")
    return tensors


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"no weights file at {path}; expected a .safetensors or .pth file, or --weights none")


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names: Any = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _require_fit(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = sorted(key for key in expected.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    extra = sorted(state.keys() - expected.keys())
    shapes = sorted(key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape)
    if any(key.endswith(".alpha") for key in extra):
        raise InputError(f"{path}: already a binary model of siman; expected full-precision weights")
    if missing or extra:
        raise InputError(
            f"{path} does not fit the model: {len(missing)} tensors missing{_first(missing)}, "
            f"{len(extra)} unknown{_first(extra)}; is it another architecture's?"
        )
    if shapes:
        key = shapes[0]
        found, wanted = tuple(state[key].shape), tuple(expected[key].shape)
        raise InputError(f"{path} does not fit the model: {key} has shape {found}, expected {wanted}")


def _first(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""
