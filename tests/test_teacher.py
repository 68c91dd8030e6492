"""Another network as teacher: the images it sees."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from siman_convert import preparation
from siman_convert.data import Preprocess
from siman_convert.models import LoadedModel
from siman_convert.recipe import Recipe

OWN = {"mean": (0.5, 0.4, 0.3), "std": (0.25, 0.5, 0.2)}
STUDENTS = Preprocess((3, 32, 32), "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0, "center")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """What --teacher loads: a network that states a mean and std of its own."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay=OWN).eval()
    monkeypatch.setattr(
        preparation, "load_model", lambda *_: LoadedModel(copy.deepcopy(model), "test_resnet", "", False)
    )
    return model


def normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize("teacher", ["test_resnet", "test_resnet={file}"])
def test_timms_weights_see_their_own_mean_and_std_and_a_file_the_models(
    teacher: str, network: nn.Module, tmp_path: Path
) -> None:
    recipe = Recipe(teacher=teacher.format(file=tmp_path), distill_weight=1.0)
    loaded = preparation._named_teacher(recipe, 10, STUDENTS)
    assert loaded is not None
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    own, given = normalised(pixels, **OWN), normalised(pixels, STUDENTS.mean, STUDENTS.std)
    answers = loaded(given)
    torch.testing.assert_close(answers, network(given if "=" in teacher else own))
    assert (network(given) - network(own)).abs().max() > 1e-3
