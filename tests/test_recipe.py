"""Recipes: precedence, refusals, and what ships."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siman_convert.errors import InputError
from siman_convert.recipe import (
    Recipe,
    build_recipe,
    load_recipe,
    parse_assignments,
    parse_recipe,
    recipe_text,
    shipped_recipes,
)


def test_shipped_recipes_are_valid_and_explained() -> None:
    assert set(shipped_recipes()) == {
        "demo",
        "finetune",
        "paper-cifar10",
        "paper-imagenet",
        "post-training",
        "quick",
        "two-step",
        "with-l2",
    }
    for name, summary in shipped_recipes().items():
        load_recipe(name)
        assert len(summary) > 30
        header = recipe_text(name)
        assert "# For: " in header
        assert "Costs: " in header


def test_the_authors_settings() -> None:
    cifar, imagenet = load_recipe("paper-cifar10"), load_recipe("paper-imagenet")
    assert (cifar.opt, cifar.lr, cifar.momentum, cifar.batch_size, cifar.epochs) == ("sgd", 0.1, 0.9, 256, 400)
    assert (cifar.weight_decay, cifar.warmup_epochs) == (5e-4, 4)  # of 4 and then lr: the rates of their 5
    assert (imagenet.opt, imagenet.lr, imagenet.momentum, imagenet.batch_size, imagenet.epochs) == (
        "sgd", 0.1, 0.9, 512, 150,
    )  # fmt: skip
    assert (imagenet.weight_decay, imagenet.warmup_epochs) == (1e-4, 0)


def test_the_measured_settings() -> None:
    for name, epochs in (("finetune", 30), ("quick", 6)):
        recipe = load_recipe(name)
        assert (recipe.epochs, recipe.opt, recipe.lr, recipe.clip_percent) == (epochs, "adamw", 3e-3, 15.0)
        assert (recipe.distill_weight, recipe.distill_temperature, recipe.label_weight) == (1.0, 4.0, 0.0)
        assert (recipe.init, recipe.binarizer, recipe.final_calibration_images) == ("remap", "half", 4096)


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 0.3\nepochs: 7\nseed: 5\n")
    assert (load_recipe(str(file)).lr, load_recipe(str(file)).momentum) == (0.3, Recipe().momentum)
    overrides = {**parse_assignments(["lr=0.4", "epochs=8"]), "lr": 0.5}  # flags go over --set
    recipe = load_recipe(str(file), overrides)
    assert (recipe.lr, recipe.epochs, recipe.seed) == (0.5, 8, 5)


def test_round_trip_and_digest() -> None:
    recipe = load_recipe("paper-cifar10", {"keep": ["layer1.*"], "clip_grad": 1.5})
    again = build_recipe(parse_recipe(recipe.to_yaml(), "text"), "text")
    assert again == recipe
    assert again.digest() == recipe.digest()
    assert load_recipe("paper-cifar10").digest() != recipe.digest()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epocs": 3}, r"unknown field 'epocs'; did you mean epochs"),
        ({"lr": -1}, r"lr: .*greater than 0, got -1"),
        ({"lr": "fast"}, r"lr: .*number.*got 'fast'"),
        ({"opt": "lion"}, r"opt: .*'sgd' or 'adamw'.*got 'lion'"),
        ({"hflip": 2}, r"hflip: .*less than or equal to 1"),
        ({"lr": float("nan")}, r"lr: "),
        ({"scale": [0.1]}, r"scale\.1: "),
        ({"init": "xavier"}, r"init: .*'remap', 'copy' or 'scratch', got 'xavier'"),
        ({"binarizer": "signs"}, r"binarizer: .*'half', 'analytic' or 'sign', got 'signs'"),
        ({"distill_temperature": 0}, r"distill_temperature: .*greater than 0, got 0"),
        ({"distill_weight": -1}, r"distill_weight: .*greater than or equal to 0, got -1"),
        ({"label_weight": "some"}, r"label_weight: .*number.*got 'some'"),
        ({"final_calibration_images": -1}, r"final_calibration_images: .*greater than or equal to 0"),
        ({"distill_weight": 0, "label_weight": 0}, r"both 0: nothing to learn from"),
        ({"distill_weight": 0, "label_weight": 1, "teacher": "resnet50"}, r"teacher 'resnet50' teaches nothing"),
        (
            {"stages": [{"binarize": "all", "distill_weight": 0, "label_weight": 1}], "teacher": "resnet50"},
            r"teacher 'resnet50' teaches nothing",
        ),
    ],
)
def test_bad_fields_are_one_line(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe("finetune", fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "expected lines of `field: value`"),
        ("lr: [1,\n", "not valid YAML"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("1: 2\n", "expected lines"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_unknown_recipe_and_hostile_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no recipe 'finetun'.*did you mean finetune"):
        load_recipe("finetun")
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (1 << 21))
    with pytest.raises(InputError, match="larger than"):
        load_recipe(str(big))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load_recipe(str(binary))


@pytest.mark.parametrize("assignment", ["lr", "=3", ""])
def test_bad_assignment(assignment: str) -> None:
    with pytest.raises(InputError, match="expected key=value"):
        parse_assignments([assignment])


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_one_clear_line(text: str) -> None:
    try:
        build_recipe(parse_recipe(text, "text"), "text")
    except InputError as error:
        assert str(error).startswith("text: ")  # noqa: PT017
