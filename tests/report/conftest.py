"""The run of trained_run, trained once."""

import pytest
from trained_run import Trained, write_images

from siman_convert.cli import run as siman
from siman_convert.runs import Run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Nobody changes its folder."""
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images")
    arguments = [
        "convert", "test_resnet", "--data", str(images), "--weights", "none", "--recipe", "demo", "--device", "cpu",
        "--fp-epochs", "1", "--epochs", "2", "--output", str(folder / "runs"), "--experiment", "run",
    ]  # fmt: skip
    assert siman(arguments) == 0
    return Trained(folder, Run(folder / "runs" / "run"))
