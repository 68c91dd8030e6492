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
    assert set(shipped_recipes()) == {"demo", "finetune", "paper-cifar10", "paper-imagenet", "post-training"}
    for name, summary in shipped_recipes().items():
        load_recipe(name)
        assert len(summary) > 30
        header = recipe_text(name)
        assert "# For: " in header
        assert "Costs: " in header


def test_the_authors_settings() -> None:
    cifar, imagenet = load_recipe("paper-cifar10"), load_recipe("paper-imagenet")
    assert (cifar.opt, cifar.lr, cifar.momentum, cifar.batch_size, cifar.epochs) == ("sgd", 0.1, 0.9, 256, 400)
    assert (cifar.weight_decay, cifar.warmup_epochs) == (5e-4, 5)
    assert (imagenet.opt, imagenet.lr, imagenet.momentum, imagenet.batch_size, imagenet.epochs) == (
        "sgd", 0.1, 0.9, 512, 150,
    )  # fmt: skip
    assert (imagenet.weight_decay, imagenet.warmup_epochs) == (1e-4, 0)


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
