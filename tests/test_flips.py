"""How many bits flip in an epoch."""

from pathlib import Path

import torch

from siman_convert.flips import Flips
from siman_convert.layers import SiMaNConv2d


def layer_of(magnitudes: list[float]) -> SiMaNConv2d:
    """One filter with weights of these magnitudes and mean 0: each stands there with both signs."""
    layer = SiMaNConv2d(2 * len(magnitudes), 1, 1, bias=False)
    set_(layer, magnitudes)
    return layer


def set_(layer: SiMaNConv2d, magnitudes: list[float]) -> None:
    values = torch.tensor(magnitudes)
    layer.weight.data.copy_(torch.cat([values, -values]).view_as(layer.weight))


def test_rates_count_bits_that_differ() -> None:
    layers = {"a": layer_of([1.0, 2, 3, 4, 5, 6]), "b": layer_of([1.0, 2, 3, 4])}
    flips = Flips(layers)
    assert flips.rates() == {}  # nothing is remembered yet
    flips.start()
    assert flips.rates() == {"a": 0.0, "b": 0.0}
    set_(layers["a"], [1.0, 2, 9, 4, 5, 0.5])  # of 0 0 0 1 1 1 the third becomes 1, the last 0
    assert flips.rates() == {"a": round(4 / 12, 6), "b": 0.0}
    flips.start()
    assert flips.rates() == {"a": 0.0, "b": 0.0}


def test_what_is_remembered_survives_a_file(tmp_path: Path) -> None:
    layers = {"a": layer_of([1.0, 2, 3, 4, 5, 6])}
    flips, resumed = Flips(layers), Flips(layers)
    flips.start()
    flips.save(tmp_path / "bits.safetensors")
    set_(layers["a"], [6.0, 5, 4, 3, 2, 1])
    resumed.load(tmp_path / "bits.safetensors")
    assert resumed.rates() == flips.rates() == {"a": 1.0}
    resumed.load(tmp_path / "not there")
    assert resumed.rates() == {}


def test_full_precision_weights_have_no_bits_to_flip() -> None:
    flips = Flips({"a": SiMaNConv2d(4, 4, 3, binarizes="activations")})
    flips.start()
    assert flips.rates() == {}
