import gzip
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_makers import attempt, idx_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from siman_convert.data import idx, open_source
from siman_convert.errors import InputError


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("prefix", "dot", "test"), [("", "-", "t10k"), ("", ".", "t10k"), ("emnist-letters-", "-", "test")]
)
def test_reads_the_family_under_all_spellings(make_idx, gz, prefix, dot, test):
    source = open_source(str(make_idx(prefix, gz=gz, dot=dot, test=test)))
    assert (source.kind, source.classes, source.image_size) == ("idx", ("0", "1", "2"), (5, 5))
    assert (len(source.train), len(source.val)) == (9, 6)
    image, label = source.train.read(4)
    expected = np.random.default_rng(1).integers(0, 256, (9, 5, 5), dtype=np.uint8)[4]
    assert image.mode == "L"
    assert label == source.train.label(4) == 1
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_raw_folder_of_torchvision_and_the_train_file_itself(make_idx, tmp_path):
    make_idx()
    (tmp_path / "Letters" / "raw").mkdir(parents=True)
    for file in tmp_path.glob("*ubyte"):
        file.rename(tmp_path / "Letters" / "raw" / file.name)
    assert open_source(str(tmp_path / "Letters")).name == "Letters"
    assert len(open_source(str(tmp_path / "Letters" / "raw" / "train-images-idx3-ubyte")).train) == 9


def test_several_data_sets_in_one_folder_need_a_choice(make_idx):
    make_idx("a-")
    folder = make_idx("b-")
    with pytest.raises(InputError, match=r"several IDX data sets \(a-train-images..., b-train-images...\); give the"):
        open_source(str(folder))
    assert open_source(str(folder / "b-train-images-idx3-ubyte")).name == "b"


def test_val_split_is_refused_where_a_test_split_exists(make_idx):
    with pytest.raises(InputError, match="has its own validation split; leave out --val-split"):
        open_source(str(make_idx()), val_split=0.1)


def rewrite(path: Path, array: np.ndarray) -> None:
    path.write_bytes(idx_bytes(array))


def test_counts_labels_and_sizes_that_do_not_fit(make_idx):
    folder = make_idx()
    train_labels, test_labels = folder / "train-labels-idx1-ubyte", folder / "t10k-labels-idx1-ubyte"
    rewrite(test_labels, np.array([0, 1, 2, 3, 0, 0], dtype=np.uint8))
    with pytest.raises(InputError, match="a test label is 3, training labels end at 2"):
        open_source(str(folder))
    rewrite(train_labels, np.zeros(8, dtype=np.uint8))
    with pytest.raises(InputError, match="9 images, but 8 labels in train-labels-idx1-ubyte"):
        open_source(str(folder))
    train_labels.unlink()
    with pytest.raises(InputError, match=r"IDX file train-labels-idx1-ubyte.*missing"):
        open_source(str(folder))
    rewrite(folder / "train-images-idx3-ubyte", np.zeros((0, 5, 5), dtype=np.uint8))
    rewrite(train_labels, np.zeros(0, dtype=np.uint8))
    with pytest.raises(InputError, match="no images in it"):
        open_source(str(folder))


def test_a_header_that_lies_is_caught_before_allocation(tmp_path):
    header = bytes((0, 0, 8, 3)) + struct.pack(">3I", 60000, 2**20, 2**12)
    plain, packed = tmp_path / "plain", tmp_path / "packed.gz"
    plain.write_bytes(header + bytes(100))
    packed.write_bytes(gzip.compress(header + bytes(100)))
    tracemalloc.start()
    for path, why in ((plain, "but the file is 116 bytes long"), (packed, "too short for that when unpacked")):
        with pytest.raises(InputError, match=why):
            idx.read_array(path, dimensions=3)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_gzip_bomb_is_read_no_further_than_declared(tmp_path):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros((1, 2, 2), dtype=np.uint8)) + bytes(200_000_000), 1))
    tracemalloc.start()
    with pytest.raises(InputError, match="goes on after the 4 values"):
        idx.read_array(path, dimensions=3)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


def damaged(content: bytes, draw_cut: int, place: int, value: int) -> bytes:
    changed = bytearray(content)
    changed[place % len(changed)] = value
    return bytes(changed[: draw_cut % (len(changed) + 1)])


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 200), place=st.integers(0, 200), value=st.integers(0, 255), gz=st.booleans())
def test_garbled_files_give_the_array_or_an_input_error_of_one_line(cut, place, value, gz):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(damaged(gzip.compress(GOOD, mtime=0) if gz else GOOD, cut, place, value))
        result = attempt(lambda: idx.read_array(path, dimensions=3))
    if isinstance(result, InputError):
        assert str(result).startswith(str(path))
        assert "\n" not in str(result)
    else:
        assert result.shape == (2, 3, 4)
