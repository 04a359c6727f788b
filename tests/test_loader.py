"""Which images a step sees, whatever the processes, accumulation, workers or interruptions; bad input in workers."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semiseg.config import RunConfig
from semiseg.config.read import parse_config
from semiseg.data.dataset import InstanceDataset, Key, build_rule
from semiseg.data.loader import (
    BatchLoader,
    StepBatches,
    build_loader,
    epoch_order,
    eval_batches,
    mixed_seed,
)
from semiseg.data.table import load_table
from semiseg.data.transforms import Resize
from semiseg.data.workers import StartMethod
from semiseg.engine.processes import normalised_together, parts_per_step
from semiseg.errors import UserError
from tests.coco_files import CocoFiles, KeepClasses, make_coco
from tests.test_data_dataset import same


def step_batches(
    num_images: int = 10,
    *,
    batch_size: int = 4,
    accumulation: int = 1,
    processes: int = 1,
    rank: int = 0,
    seed: int = 3,
    start_step: int = 0,
    steps: int = 15,
) -> StepBatches:
    return StepBatches(
        num_images,
        batch_size=batch_size,
        accumulation=accumulation,
        processes=processes,
        rank=rank,
        seed=seed,
        start_step=start_step,
        steps=steps,
    )


def by_step(processes: int, accumulation: int) -> list[list[Key]]:
    """The keys of every step, parts in order and ranks inside them."""
    ranks = [list(step_batches(processes=processes, rank=rank, accumulation=accumulation)) for rank in range(processes)]
    assert {len(batches) for batches in ranks} == {15 * accumulation}
    return [
        [
            key
            for part in range(accumulation)
            for rank in range(processes)
            for key in ranks[rank][step * accumulation + part]
        ]
        for step in range(15)
    ]


@pytest.mark.parametrize(("processes", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_a_step_is_the_same_however_it_is_divided(processes: int, accumulation: int) -> None:
    assert by_step(processes, accumulation) == by_step(1, 1)


def test_every_image_once_an_epoch_and_epochs_differ() -> None:
    stream = [key for batch in step_batches() for key in batch]  # 60 keys: 6 epochs of 10, batches of 4 straddle them
    epochs = [[row for row, _ in stream[first : first + 10]] for first in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len({seed for _, seed in stream}) == 60
    assert epochs[2] == epoch_order(10, seed=3, epoch=2)


def test_order_and_sample_seeds_depend_on_the_seed() -> None:
    assert list(step_batches(seed=3)) == list(step_batches(seed=3))
    assert [row for batch in step_batches(seed=3) for row, _ in batch] != [
        row for batch in step_batches(seed=4) for row, _ in batch
    ]
    assert mixed_seed("sample", 3, 0) != mixed_seed("sample", 4, 0) != mixed_seed("epoch", 4, 0)


@pytest.mark.parametrize("start_step", [0, 1, 7, 14, 15])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resuming_yields_the_tail(start_step: int, accumulation: int) -> None:
    whole = list(step_batches(accumulation=accumulation))
    resumed = step_batches(accumulation=accumulation, start_step=start_step)
    assert list(resumed) == whole[start_step * accumulation :]
    assert len(resumed) == (15 - start_step) * accumulation


@st.composite
def cut_runs(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(images, batch, [(first step, processes, parts)]): a run that is stopped and continued under other cuts."""
    processes_and_parts = st.tuples(st.integers(1, 4), st.integers(1, 4))
    cuts = draw(st.lists(processes_and_parts, min_size=1, max_size=3))
    batch = math.lcm(*(processes * parts for processes, parts in cuts)) * draw(st.integers(1, 2))
    starts = [0, *sorted(draw(st.integers(0, 4)) for _ in cuts[1:])]
    return draw(st.integers(1, 30)), batch, [(start, *cut) for start, cut in zip(starts, cuts, strict=True)]


@settings(max_examples=30)
@given(cut_runs())
def test_the_stream_is_the_same_for_any_processes_parts_and_interruptions(
    run: tuple[int, int, list[tuple[int, int, int]]],
) -> None:
    images, batch, cuts = run
    steps = 4
    whole = [key for keys in step_batches(images, batch_size=batch, steps=steps) for key in keys]
    assert len(whole) == steps * batch
    stream = []
    for (start, processes, parts), (end, *_) in pairwise([*cuts, (steps, 0, 0)]):
        common = {"batch_size": batch, "accumulation": parts, "processes": processes, "start_step": start}
        ranks = [list(step_batches(images, **common, rank=rank, steps=steps)) for rank in range(processes)]
        assert {len(batches) for batches in ranks} == {(steps - start) * parts}
        # Until it is stopped: part after part, and in each the ranks in their order.
        for part in range((end - start) * parts):
            stream += [key for rank in range(processes) for key in ranks[rank][part]]
    assert stream == whole


@settings(max_examples=30)
@given(st.integers(1, 32), st.integers(0, 40), st.integers(1, 8), st.integers(1, 4))
def test_the_rule_of_processes_cuts_a_batch_into_parts_that_fit(
    batch: int, limit: int, processes: int, accumulation: int
) -> None:
    values = {
        "optim": {"steps": 1, "batch_size": batch * accumulation, "accumulation": accumulation},
        "runtime": {"images_per_process": limit},
    }
    config = parse_config(RunConfig, values, where="test")
    try:
        parts = parts_per_step(config, processes)
    except UserError:
        assert (batch * accumulation) % processes or batch * accumulation // processes < accumulation
        return
    total = config.optim.batch_size
    images = step_batches(50, batch_size=total, accumulation=parts, processes=processes, steps=1).images_per_batch
    assert images * parts * processes == total
    assert parts >= accumulation
    assert images <= (limit or total)
    cut = normalised_together(config, processes)  # of the default network, whose mask branch has batch norm
    assert cut == ({"normalised_together": {"bn": images}} if images < total else {})


def test_more_images_in_a_batch_than_in_the_data_set() -> None:
    (batch,) = step_batches(3, batch_size=8, steps=1)
    rows = [row for row, _ in batch]
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]
    assert len({seed for _, seed in batch}) == 8


def test_a_batch_that_cannot_be_divided() -> None:
    with pytest.raises(UserError, match=r"batch_size = 4 must divide by accumulation x processes = 1 x 3 = 3"):
        step_batches(processes=3)
    with pytest.raises(UserError, match="no images"):
        step_batches(0)


def make_dataset(files: CocoFiles) -> InstanceDataset:
    return InstanceDataset(
        load_table(files.annotations, files.images, cache=files.annotations.parent / "cache"),
        rule=build_rule("split", KeepClasses(("cat", "dog"))),
        transform=Resize(short_sides=(48, 56, 64), long_side=99, flip=0.5),
        mask_stride=2,
        bottom_rows_without_affinity=10,
    )


def train_loader(
    dataset: InstanceDataset, workers: int, start_step: int = 0, start_method: StartMethod = "forkserver"
) -> BatchLoader:
    return build_loader(
        dataset,
        batches=step_batches(len(dataset), steps=5, start_step=start_step),
        size_divisor=32,
        workers=workers,
        pin_memory=False,
        start_method=start_method if workers else None,
    )


def test_workers_that_get_all_by_pickling_give_the_same_batches_and_bad_input_as_one_sentence(tmp_path: Path) -> None:
    """As spawned ones do; the server that forks these has imported torch before."""
    files = make_coco(tmp_path)
    dataset = make_dataset(files)
    generator_before = torch.get_rng_state()
    alone = list(train_loader(dataset, workers=0))
    assert len(alone) == 5
    several = train_loader(dataset, workers=2)
    from_workers = list(several)
    assert torch.equal(torch.get_rng_state(), generator_before)  # no hidden draw from the global generator
    assert len(from_workers) == 5
    assert all(same(a, b) for a, b in zip(alone, from_workers, strict=True))
    assert all(same(a, b) for a, b in zip(train_loader(dataset, workers=0, start_step=2), alone[2:], strict=True))

    (files.images / "003.png").write_bytes(b"nothing")
    for loader in (several, train_loader(dataset, workers=0)):
        with pytest.raises(UserError) as caught:
            list(loader)
        assert str(caught.value) == f"{files.images / '003.png'}: the image cannot be decoded: not an image or damaged"


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_shards_are_disjoint_and_complete(tmp_path: Path, processes: int) -> None:
    files = make_coco(tmp_path, sizes_hw=[(24 + number, 40) for number in range(7)], annotations=[])
    dataset = make_dataset(files)
    shards = []
    for rank in range(processes):
        chosen = eval_batches(len(dataset), batch_size=2, processes=processes, rank=rank)
        loader = build_loader(dataset, batches=chosen, workers=0, size_divisor=32)
        batches = list(loader)
        assert len(batches) == len(loader)
        shards.append([image_id for batch in batches for image_id in batch.image_ids])
    assert sorted(image_id for shard in shards for image_id in shard) == list(range(1, 8))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_more_processes_than_images(tmp_path: Path) -> None:
    dataset = make_dataset(make_coco(tmp_path, sizes_hw=[(32, 32)], annotations=[]))
    chosen = eval_batches(len(dataset), batch_size=2, processes=2, rank=1)
    loader = build_loader(dataset, batches=chosen, workers=0, size_divisor=32)
    assert list(loader) == []


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than the machine has cores
@pytest.mark.parametrize(("workers", "batch_size", "ahead"), [(8, 16, 1), (8, 8, 2), (8, 2, 2), (2, 16, 2), (40, 2, 1)])
def test_large_batches_wait_once_per_worker(tmp_path: Path, workers: int, batch_size: int, ahead: int) -> None:
    dataset = make_dataset(make_coco(tmp_path, sizes_hw=[(32, 32)] * 17, annotations=[]))
    common: dict[str, Any] = {"size_divisor": 32, "workers": workers, "pin_memory": False}
    batches = step_batches(1, batch_size=2 * batch_size, accumulation=2)
    assert build_loader(dataset, batches=batches, **common).prefetch_factor == ahead
    chosen = eval_batches(len(dataset), batch_size=batch_size, processes=1, rank=0)
    evaluation = build_loader(dataset, batches=chosen, **common)
    assert evaluation.prefetch_factor == ahead


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux, and forked workers")
@pytest.mark.parametrize(
    ("limit", "told"),
    [("files", "ulimit -n"), ("memory", "--shm-size"), ("start", "ulimit -n"), ("locks", "--shm-size")],
)
def test_workers_that_cannot_pass_a_batch_on_are_one_sentence(
    tmp_path: Path, limit: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no wait for ever, nor a traceback beside it: what the limits forbid would else fail in a worker's thread."""
    import resource

    loader = train_loader(make_dataset(make_coco(tmp_path)), workers=1, start_method="fork")
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    kind = resource.RLIMIT_FSIZE if limit in ("memory", "locks") else resource.RLIMIT_NOFILE
    open_now = len(os.listdir("/proc/self/fd"))
    soft, hard = resource.getrlimit(kind)
    value = {"files": open_now + 24, "memory": 2**13, "start": open_now + 1, "locks": 0}[limit]
    resource.setrlimit(kind, (value, hard))
    try:
        with pytest.raises(UserError, match=rf"the loader's workers failed \(.*\): .*{told}.* runtime\.workers = 0"):
            list(loader)
    finally:
        resource.setrlimit(kind, (soft, hard))
    gc.collect()
    assert not ignored


@pytest.mark.skipif(sys.platform != "linux", reason="forked workers")
def test_a_worker_that_is_killed_is_one_sentence_where_its_batch_is_wanted(tmp_path: Path) -> None:
    before, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    batches = iter(train_loader(make_dataset(make_coco(tmp_path)), workers=1, start_method="fork"))
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    worker.kill()
    worker.join()
    told = r"the loader's workers failed \((DataLoader worker|one of them).*\): .*runtime\.workers = 0"
    with pytest.raises(UserError, match=told):
        list(batches)


def test_a_process_that_still_holds_a_loader_ends(tmp_path: Path) -> None:
    """As after an exception whose traceback keeps the loader: its workers must not be waited for."""
    code = f"""
import sys
from pathlib import Path
from tests.coco_files import make_coco
from tests.test_loader import make_dataset, train_loader
sys.held = iter(train_loader(make_dataset(make_coco(Path({str(tmp_path)!r}))), workers=1, start_method="fork"))
next(sys.held)
print("held")
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr, done.returncode) == ("held\n", "", 0)
