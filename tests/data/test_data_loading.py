import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from data_makers import ramp_split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siman_convert.data import (
    Augment,
    Batch,
    Preprocess,
    batches_per_epoch,
    eval_loader,
    eval_transform,
    iterate,
    open_source,
    train_loader,
    train_transform,
    worker_error,
)
from siman_convert.errors import InputError, SimanError

PRE = Preprocess((3, 16, 16), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 1.0, "center")
# Draws from all three generators: numpy (RandAugment's choice), python (crop, erasing), torch (flip, jitter, pixels).
RANDOM = Augment(hflip=0.5, color_jitter=0.4, aa="rand-m9-n2-mstd0.5", reprob=0.5)


def number_only(image: Image.Image) -> torch.Tensor:
    return torch.tensor([[[float(image.convert("L").getpixel((0, 0)))]]])


def targets(loader) -> list[list[int]]:
    return [batch.targets.tolist() for batch in iterate(loader)]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.images, other.images)
        assert one.bad == other.bad


@pytest.mark.parametrize("start", [0, 1, 4])
def test_resume_is_exact_whatever_the_workers(start):
    transform = train_transform(PRE, RANDOM)
    split = ramp_split(37, bad=(5, 6, 20))
    options = {"batch_size": 8, "epoch": 2, "seed": 11}
    whole = list(iterate(train_loader(split, transform, **options)))
    assert [len(batch.targets) for batch in whole] == [8, 8, 8, 8, 5]
    random.random(), torch.rand(3)  # what else draws must not matter
    for workers in (0, 2):
        resumed = train_loader(split, transform, **options, workers=workers, start_batch=start)
        assert len(resumed) == 5 - start
        assert_same(list(iterate(resumed)), whole[start:])


def test_augmentation_differs_by_epoch_seed_and_index():
    transform = train_transform(PRE, RANDOM)
    seen = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        for batch in train_loader(ramp_split(6), transform, batch_size=6, epoch=epoch, seed=seed):
            for image, target in zip(batch.images, batch.targets.tolist(), strict=True):
                seen[seed, epoch, target] = image.numpy().tobytes()
    assert len(set(seen.values())) == 18


def test_the_callers_generators_are_left_as_they_were():
    transform = train_transform(PRE, RANDOM)
    np.random.standard_normal()  # leaves a cached second value behind

    def draws() -> tuple[float, float, float, float]:
        return random.random(), float(np.random.standard_normal()), float(np.random.rand()), float(torch.rand(1))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draws()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    for workers in (0, 1):
        list(train_loader(ramp_split(9), transform, batch_size=4, epoch=0, seed=0, workers=workers))
        list(eval_loader(ramp_split(9), eval_transform(PRE), batch_size=4, workers=workers))
    assert draws() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 2**70))
def test_ranks_share_an_epoch(count, batch_size, world, epoch, seed):
    split = ramp_split(count)

    def loader(rank: int, start: int = 0):
        return train_loader(
            split,
            number_only,
            batch_size=batch_size,
            epoch=epoch,
            seed=seed,
            rank=rank,
            world=world,
            start_batch=start,
        )

    ranks = [targets(loader(rank)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {batches_per_epoch(split, batch_size, world)}
    assert {sum(map(len, batches)) for batches in ranks} == {-(-count // world)}
    drawn = [list(chain.from_iterable(batches)) for batches in ranks]
    order = [drawn[i % world][i // world] for i in range(len(drawn[0]) * world)]
    assert sorted(order[:count]) == list(range(count))  # a permutation, then its own beginning again
    assert order[count:] == (order * world)[: len(order) - count]
    assert all(len(batch) == batch_size for batches in ranks for batch in batches[:-1])
    assert targets(loader(0, start=1)) == ranks[0][1:]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 39)))
def test_evaluation_covers_each_readable_sample_once(count, batch_size, world, bad):
    split = ramp_split(count, bad=tuple(bad))
    batches = [
        list(iterate(eval_loader(split, number_only, batch_size=batch_size, rank=rank, world=world)))
        for rank in range(world)
    ]
    for rank, own in enumerate(batches):
        expected = [i for i in range(rank, count, world) if i not in bad]
        assert [t for batch in own for t in batch.targets.tolist()] == expected
        assert all(batch.images.shape[1:] == (1, 1, 1) for batch in own)
    named = sorted(int(record.path.split("-")[1]) for own in batches for batch in own for record in batch.bad)
    assert named == sorted(i for i in bad if i < count)


def test_order_changes_with_epoch_and_seed():
    orders = {
        tuple(targets(train_loader(ramp_split(30), number_only, batch_size=30, epoch=epoch, seed=seed))[0])
        for epoch in range(3)
        for seed in range(3)
    }
    assert len(orders) == 9


def test_an_unreadable_training_image_is_replaced_by_the_next_and_reported():
    split = ramp_split(6, bad=(2, 3, 5))
    (batch,) = iterate(train_loader(split, number_only, batch_size=6, epoch=0, seed=0))
    assert sorted(batch.targets.tolist()) == [0, 0, 1, 4, 4, 4]  # 2 and 3 became 4, 5 went round to 0
    assert sorted(record.path for record in batch.bad) == ["image-2", "image-3", "image-3", "image-5"]
    assert batch.bad[0].why == "broken on purpose"


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_unreadable_images_ends_in_one_line(workers):
    split = ramp_split(300, bad=tuple(range(300)))
    loader = train_loader(split, number_only, batch_size=4, epoch=0, seed=0, workers=workers)
    with pytest.raises(
        InputError, match=r"^100 training images in a row cannot be read, the first: image-\d+: brok"
    ) as e:
        list(iterate(loader))
    assert "\n" not in str(e.value)


def kill_own_process(image: Image.Image) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGKILL)
    return number_only(image)


def test_a_worker_that_dies_is_an_error_and_not_a_hang():
    loader = train_loader(ramp_split(8), kill_own_process, batch_size=4, epoch=0, seed=0, workers=1)
    started = time.monotonic()
    with pytest.raises(SimanError, match=r"a data loading process ended: worker \(pid.*fewer workers \(-j 0") as caught:
        list(iterate(loader))
    assert not isinstance(caught.value, InputError)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 30


def test_the_death_of_a_worker_is_not_raised_out_of_a_signal_handler():
    """There it would leave locks taken that the end of the loader waits for."""
    if not hasattr(signal, "SIGCHLD"):
        return
    before = signal.getsignal(signal.SIGCHLD)
    list(iterate(train_loader(ramp_split(8), number_only, batch_size=4, epoch=0, seed=0, workers=1)))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_errors_that_are_not_a_workers_pass_unchanged():
    for error in (RuntimeError("CUDA out of memory"), ValueError("x"), InputError("one line")):
        assert worker_error(error) is None

    def broken(image: Image.Image) -> torch.Tensor:
        raise RuntimeError(f"transform of {image.mode}")

    with pytest.raises(RuntimeError, match=r"^transform of L$"):
        list(iterate(train_loader(ramp_split(3), broken, batch_size=1, epoch=0, seed=0)))


def signals_and_threads(_: Image.Image) -> torch.Tensor:
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return torch.tensor([[[float(ignored), float(torch.get_num_threads())]]])


SLOW_START = """
import os, signal, threading, time
import torch.utils.data._utils.worker as torch_worker
from test_data_loading import number_only, ramp_split
from siman_convert.data import eval_loader, iterate

def early_work(*arguments, former=torch_worker._generate_state):  # between torch's signal handlers and ours
    os.write(ready, b".")
    time.sleep(0.5)
    return former(*arguments)

def to_the_group():
    os.read(waits, 1)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(0, number)

torch_worker._generate_state = early_work
waits, ready = os.pipe()
seen = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: seen.append(int(number)))
threading.Thread(target=to_the_group, daemon=True).start()
loader = eval_loader(ramp_split(3), number_only, batch_size=2, workers=1)
print([batch.targets.tolist() for batch in iterate(loader)], sorted(seen))
"""


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the slow start reaches forked workers only")
def test_a_worker_that_just_starts_outlives_a_signal_to_the_whole_group():
    """torchrun ends the processes of a training by one: what they say of it must not be that a worker died."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW_START],
        capture_output=True, text=True, timeout=120, start_new_session=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    whole = [batch.targets.tolist() for batch in iterate(eval_loader(ramp_split(3), number_only, batch_size=2))]
    assert done.stdout == f"{whole} {[int(signal.SIGINT), int(signal.SIGTERM)]}\n", done.stderr


OTHER_STARTS = """
import multiprocessing, signal, sys
from test_data_loading import number_only, ramp_split
from siman_convert.data import eval_loader, iterate

def blocked(answers):
    answers.put(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1], force=True)
    multiprocessing.Lock()  # starts what keeps track of it, as what ran before may have done
    loader = eval_loader(ramp_split(3), number_only, batch_size=2, workers=1)
    batches = [batch.targets.tolist() for batch in iterate(loader)]
    answers = multiprocessing.Queue()
    other = multiprocessing.Process(target=blocked, args=(answers,))
    other.start()
    print(batches, answers.get(), sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, ()))))
    other.join()
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals are not held there")
@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_what_is_not_forked_loads_too_and_leaves_no_signal_blocked(method: str, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(OTHER_STARTS)
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, str(script), method],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": here},
    )  # fmt: skip
    assert done.stdout == "[[0, 1], [2]] [] []\n", done.stderr


def test_workers_ignore_ctrl_c_and_use_one_thread():
    (batch,) = eval_loader(ramp_split(1), signals_and_threads, batch_size=1, workers=1)
    assert batch.images.flatten().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ["batch_size", "world"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(InputError, match="0: expected at least 1"):
        eval_loader(ramp_split(3), number_only, **({"batch_size": 1} | {name: 0}))


def test_digits_through_both_loaders():
    source = open_source("digits")
    assert (source.classes, source.image_size) == (tuple("0123456789"), (8, 8))
    assert (len(source.train), len(source.val)) == (1438, 359)
    seen = np.zeros(10, dtype=int)
    for batch in eval_loader(source.val, eval_transform(PRE), batch_size=100):
        assert batch.images.shape[1:] == (3, 16, 16)
        assert (batch.images.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
        seen += np.bincount(batch.targets.numpy(), minlength=10)
    assert seen.min() >= 34
    assert max(source.train.read(i)[0].getextrema()[1] for i in range(20)) == 255
