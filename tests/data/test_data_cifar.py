import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from data_makers import attempt
from hypothesis import given, settings
from hypothesis import strategies as st

from siman_convert.data import cifar, open_source
from siman_convert.errors import InputError


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("fine", [False, True])
def test_reads_batches_of_every_pickle_protocol(make_cifar, fine, protocol):
    source = open_source(str(make_cifar(fine=fine, protocol=protocol)))
    assert (source.kind, source.name) == ("cifar", "cifar100" if fine else "cifar10")
    assert source.classes == ("cat", "dog", "owl")
    assert (len(source.train), len(source.val)) == (4 if fine else 20, 4)
    image, label = source.train.read(2)
    first = np.random.default_rng(2).integers(0, 256, (4, 3072), dtype=np.uint8)[2]
    assert (image.mode, label) == ("RGB", 2)
    np.testing.assert_array_equal(np.asarray(image), first.reshape(3, 32, 32).transpose(1, 2, 0))


def test_the_batches_folder_itself_is_recognised_too(make_cifar):
    assert open_source(str(make_cifar() / "cifar-10-batches-py")).name == "cifar10"


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/siman-was-here",)


@pytest.mark.parametrize("evil", [Evil(), np.random.default_rng, np.float64, getattr, {"data": print}])
def test_any_other_global_is_refused_by_name_and_not_called(make_cifar, evil):
    folder = make_cifar() / "cifar-10-batches-py"
    (folder / "data_batch_3").write_bytes(pickle.dumps(evil))
    with pytest.raises(InputError, match=r"data_batch_3: asks for [\w.]+, which no CIFAR file needs: refused"):
        open_source(str(folder))
    assert not Path("/tmp/siman-was-here").exists()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({b"labels": [0, 1, 2, 3]}, r"label 3 is outside 0..2"),
        ({b"labels": [0, -1, 2, 0]}, r"label -1 is outside 0..2"),
        ({b"labels": [0, 1]}, "4 images but 2 labels"),
        ({b"labels": "abcd"}, "labels is not a list of integers"),
        ({b"data": np.zeros((4, 3072), np.int16)}, "data is not an array of N x 3072 bytes"),
        ({b"data": np.zeros((4, 3071), np.uint8)}, "data is not an array of N x 3072 bytes"),
        ({b"data": np.array([None] * 4)}, "data is not an array of N x 3072 bytes"),
        ({b"data": b"text"}, "data is not an array of N x 3072 bytes"),
    ],
)
def test_wrong_content_says_what_is_wrong(make_cifar, change, why):
    folder = make_cifar() / "cifar-10-batches-py"
    batch = {b"data": np.zeros((4, 3072), np.uint8), b"labels": [0, 1, 2, 1]} | change
    (folder / "test_batch").write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(InputError, match=f"test_batch: {why}"):
        open_source(str(folder))


def test_missing_batches_are_named(make_cifar):
    folder = make_cifar() / "cifar-10-batches-py"
    (folder / "data_batch_4").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(InputError, match="cifar10 files missing: data_batch_4, test_batch"):
        open_source(str(folder))


def test_fortran_order_as_pickled_by_numpy(tmp_path):
    array = np.asfortranarray(np.arange(12, dtype=np.uint8).reshape(3, 4))
    (tmp_path / "x").write_bytes(pickle.dumps(array, protocol=2))
    loaded = cifar.load(tmp_path / "x")
    assert isinstance(loaded, cifar._Array)
    np.testing.assert_array_equal(loaded.as_numpy(), array)


PICKLED = pickle.dumps({b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2]}, protocol=2)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(PICKLED)), st.integers(0, len(PICKLED) - 1), st.binary(min_size=1, max_size=4))
def test_garbled_pickles_never_raise_anything_else(cut, place, put):
    content = PICKLED[:place] + put + PICKLED[place + len(put) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch"
        path.write_bytes(content[: cut or len(content)])
        result = attempt(lambda: cifar.load(path))
    if isinstance(result, InputError):
        assert str(result).startswith(str(path))
        assert "\n" not in str(result)
