import pytest
from hypothesis import given
from hypothesis import strategies as st

from siman_convert.data import open_source
from siman_convert.data.source import safe_name
from siman_convert.errors import InputError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("/no/such/place", "no such path: /no/such/place; expected a folder, a file, or digits, hfds/NAME"),
        ("", r"no such path: \(empty\)"),
        ("a\0b", r"a\\x00b(: cannot be looked up|; expected)"),
        ("~nobody-of-that-name/x", "cannot be looked up"),
        ("x" * 5000, "cannot be looked up|no such path"),
        ("/dev/null", "/dev/null: neither a file nor a folder; expected a folder"),
        (__file__, "a file of unknown kind; expected a folder, .tar, or train-images-idx3-ubyte"),
    ],
)
def test_paths_that_are_not_data(spec, message):
    with pytest.raises(InputError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_digits_are_the_same_for_everybody():
    first, second = open_source("digits", seed=0), open_source("digits", seed=9)
    assert (first.val.images == second.val.images).all()
    with pytest.raises(InputError, match="digits: has its own validation split"):
        open_source("digits", val_split=0.5)


def test_the_spec_of_a_relative_path_opens_the_same_from_elsewhere(make_folder, monkeypatch, tmp_path):
    root = make_folder({"set/train/a": 1, "set/train/b": 1, "set/val/a": 1, "set/val/b": 1})
    monkeypatch.chdir(root)
    source = open_source("./set/")
    monkeypatch.chdir("/")
    assert (source.name, source.spec) == ("set", str(tmp_path / "set"))
    assert open_source(source.spec).train.paths == source.train.paths


@given(st.text(max_size=80))
def test_names_are_safe_in_file_names(text):
    name = safe_name(text)
    assert 0 < len(name) <= 64
    assert name.isascii()
    assert not set(name) & set("/\\: \n\0")
    assert name not in (".", "..")
    assert not name.startswith("-")


def test_names_say_what_it_is():
    specs = {"hfds/timm/oxford-iiit-pet": "oxford-iiit-pet", "/data/My Set/": "My-Set", "torch/cifar10:/x/y": "y"}
    assert {spec: safe_name(spec) for spec in specs} == specs
