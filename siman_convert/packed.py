"""A packed model as one file, `model.safetensors`, and back: `save_packed` writes it, `load` gives the torch module.

The tensors are those of the packed model's state_dict (`frozen`), under timm's names: of a binary convolution
`<name>.weight_bits` (U8, laid out as `bits` says), `<name>.scale` and `<name>.bias` (F32), everything else as F32 or I64,
or, where the metadata say `half`, floating tensors of two and more dimensions as F16 (scales have one). A tensor that
several modules share is there once, under its first name.

The metadata are one key, "siman" (several would come out in random order): canonical JSON (`description`) of what
`to_metadata` gives and of "sha256": {"metadata": M, "tensors": T}, in lower-case hex. So equal weights make equal files.
    M  SHA-256 of the UTF-8 canonical JSON without its "sha256" entry
    T  SHA-256 over all tensors in the order of their names (by code point), each as four fields: name in UTF-8; dtype as
       the safetensors header has it ("F32"); shape as decimal numbers with commas between ("64,3,7,7", "" for a scalar);
       the data, little-endian, C order, as they lie in the file. Before each field its length in bytes as 8 bytes,
       little-endian.
They find damage, not forgery: whoever alters a file can compute them anew. So `load` trusts nothing: names, shapes and
dtypes are compared with the architecture's, built without memory, before anything of their size is allocated, and values
are checked. It unpickles nothing, runs nothing from the file and needs no network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from torch import Tensor, nn

from siman_convert.bits import check_packed
from siman_convert.description import KEY, Description, as_half, describe, description_of
from siman_convert.errors import InputError
from siman_convert.files import disk_errors, replacing
from siman_convert.frozen import PackedConv2d, empty_packed, halved_names
from siman_convert.metadata import AGAIN, located, seal, to_metadata, unseal
from siman_convert.models import create, require_known

Array = npt.NDArray[Any]  # little-endian, C order, of one of these dtypes
MAX_BYTES = 8 << 30  # three times what the largest CNN of timm takes
_MAX_HEADER = 100_000_000  # safetensors' own limit
_NUMPY_CODES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1"}
_DTYPES: dict[str, np.dtype[Any]] = {code: np.dtype(numpy_code) for code, numpy_code in _NUMPY_CODES.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_TORCH_CODES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def tensors_digest(arrays: Mapping[str, Array]) -> str:
    """SHA-256 of named arrays (hex), as the module's docstring defines it."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        shape = ",".join(map(str, array.shape))
        for field in (name.encode(), _CODES[array.dtype].encode(), shape.encode(), array.tobytes()):
            digest.update(len(field).to_bytes(8, "little"))
            digest.update(field)
    return digest.hexdigest()


def save_packed(model: nn.Module, path: Path) -> int:
    """Write a packed model with its description to `path`, atomically; returns the bytes of its tensors.

    Raises InputError for values that are not finite, dtypes other than float32, int64 and uint8, and values that `half`
    promises to be float16 but are not.
    """
    with located(path):
        if path.is_dir() or not path.parent.is_dir():
            raise InputError("cannot be written there; expected the name of a file in a folder that exists")
        description = description_of(model)
        layout = _layout(model, description.half)
        arrays = {name: _array(name, *layout[name]) for name in sorted(layout)}
        _require_values(model, arrays)
        metadata = {KEY: seal(to_metadata(description), tensors_digest(arrays))}
    with disk_errors(path), replacing(path) as temporary:
        temporary.write_bytes(save(arrays, metadata))
    return sum(array.nbytes for array in arrays.values())


@torch.no_grad()
def round_to_half(model: nn.Module) -> nn.Module:
    """Round the floating tensors of two and more dimensions to float16 values, in place; the description says so.

    They stay float32. Raises InputError, before anything is changed, for a value beyond float16's range.
    """
    description = description_of(model)
    halved = halved_names(model)
    chosen = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name in halved}
    for name, tensor in chosen.items():
        if not tensor.half().isfinite().all():
            largest = float(tensor.abs().max())
            raise InputError(f"{name}: a magnitude of {largest:g} is beyond float16's 65504; export it without half")
    for tensor in chosen.values():
        tensor.copy_(tensor.half())
    return describe(model, as_half(description))


def load(path: str | Path) -> nn.Module:
    """The packed model in a file that `siman export` wrote, as a torch module on the CPU, float32, in eval mode.

    Raises InputError, one line that begins with the path, for anything else, damaged files included.
    """
    path = Path(path)
    with located(path):
        data = _read(path, header_only=False)
        arrays = _arrays(data)
        description, digest = unseal(_metadata(data))
        if tensors_digest(arrays) != digest:
            raise InputError(f"the tensors do not have the SHA-256 that the metadata state; {AGAIN}")
        require_known(description.architecture)
        skeleton = _empty_model(description, "meta")
        _require_fit(skeleton, arrays, description.half)
        _require_values(skeleton, arrays)
        return describe(_fill(_empty_model(description, "cpu"), arrays), description)


def read_description(path: str | Path) -> Description:
    """What a file says about itself, from its first kilobytes; the tensors are neither read nor checked."""
    path = Path(path)
    with located(path):
        return unseal(_metadata(_read(path, header_only=True)))[0]


def _layout(model: nn.Module, half: bool) -> dict[str, tuple[Tensor, str]]:
    """The state_dict, each tensor once, under its first name, with the dtype that it has in the file."""
    state = model.state_dict(keep_vars=True)  # the tensors themselves: two names of one are the same object
    halved = halved_names(model) if half else set()
    codes = {name: "F16" if name in halved else _TORCH_CODES.get(t.dtype, str(t.dtype)) for name, t in state.items()}
    return {name: (state[name], codes[name]) for name, first in _first_names(state).items() if name == first}


def _first_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Every name -> the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _array(name: str, tensor: Tensor, code: str) -> Array:
    if code not in _DTYPES:
        raise InputError(f"{name}: a packed model holds float32, int64 and uint8, not {tensor.dtype}")
    array: Array = tensor.detach().cpu().contiguous().numpy()
    with np.errstate(over="ignore"):
        stored: Array = array.astype(_DTYPES[code], copy=False)
    if not np.array_equal(stored, array, equal_nan=True):
        raise InputError(f"{name}: its values are not float16 numbers; round_to_half makes them so")
    return stored


def _require_values(model: nn.Module, arrays: Mapping[str, Array]) -> None:
    """InputError for a value that no packed model has: not finite, or a padding bit that is set."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{name}: holds values that are not finite; such a model cannot be used, export another")
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedConv2d))
    for name, layer in layers:
        key = f"{name}.weight_bits".removeprefix(".")
        try:
            check_packed(arrays[key], layer.channels)
        except InputError as error:
            raise InputError(f"{key}: {error}") from error


def _require_fit(model: nn.Module, arrays: Mapping[str, Array], half: bool) -> None:
    """InputError unless the arrays are the model's tensors, each of its shape and dtype."""
    layout = _layout(model, half)
    for name, (tensor, code) in layout.items():
        wanted = f"{code} of shape {tuple(tensor.shape)}"
        if name not in arrays:
            raise InputError(f"{name} is missing, expected {wanted}; {AGAIN}")
        found = f"{_CODES[arrays[name].dtype]} of shape {arrays[name].shape}"
        if found != wanted:
            raise InputError(f"{name}: expected {wanted}, found {found}; {AGAIN}")
    extra = sorted(arrays.keys() - layout.keys())
    if extra:
        raise InputError(f"{extra[0]} is not a tensor of this model, {len(extra)} such in all; {AGAIN}")


def _empty_model(description: Description, device: str) -> nn.Module:
    with torch.device(device), torch.random.fork_rng(devices=[]):  # loading draws nothing from the caller's generator
        model = create(description.architecture, len(description.classes))
        return empty_packed(model, description.plan)


def _fill(model: nn.Module, arrays: Mapping[str, Array]) -> nn.Module:
    names = _first_names(model.state_dict(keep_vars=True))
    tensors = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    model.load_state_dict({name: tensors[first] for name, first in names.items()})
    return model.eval()


def _read(path: Path, header_only: bool) -> bytes:
    """The file's bytes, or those of its header. What cannot be a safetensors file is not read whole."""
    try:
        if not path.is_file():  # opening a pipe would wait for its writer
            what = "there is no such file" if not path.exists() else "not a file"
            raise InputError(f"{what}; expected the model.safetensors that `siman export` wrote")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > MAX_BYTES:
                raise InputError(f"{size} bytes, larger than any packed model ({MAX_BYTES} at most)")
            length = 8 + int.from_bytes(file.read(8), "little")
            if not 8 < length <= min(size, 8 + _MAX_HEADER):
                raise InputError(f"not a safetensors file, or cut off ({size} bytes); {AGAIN}")
            file.seek(0)
            return file.read(length if header_only else size)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}") from error


def _metadata(data: bytes) -> str:
    """The text of the metadata in a safetensors file's bytes."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        metadata = header["__metadata__"]
        text = metadata[KEY]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        reason = f"not a packed model: its header has no metadata {KEY!r}"
        raise InputError(f"{reason}; expected the file that `siman export` wrote") from error
    if len(metadata) != 1 or not isinstance(text, str):
        raise InputError(f"metadata: expected the one text {KEY!r}, found {', '.join(map(repr, metadata))}; {AGAIN}")
    return text


def _arrays(data: bytes) -> dict[str, Array]:
    """The tensors by name, over memory of their own."""
    try:
        entries: list[tuple[str, dict[str, Any]]] = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise InputError(f"not a safetensors file, or cut off ({error}); {AGAIN}") from error
    for name, entry in entries:
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{name}: dtype {entry['dtype']}; a packed model has {', '.join(_DTYPES)} only; {AGAIN}")
    return {name: np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], entry["data"]) for name, entry in entries}
