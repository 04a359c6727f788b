"""`python -m benchmarks`: rows compute the same as their straightforward formulations, and it says so or fails."""

from __future__ import annotations

import csv
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import masks, measure, rows, step
from benchmarks import straightforward as plain
from benchmarks.__main__ import as_json, main, table_line
from benchmarks.evaluation import EVALUATION
from benchmarks.inputs import coco_like_boxes
from benchmarks.measure import Close, Place, Row, Side, Sizes, Task, Worker, measure_row, peak_memory
from benchmarks.rows import ROWS, chosen_rows, on_gpu
from benchmarks.step import STEP_GPU, matrix_peak, step_facts
from semiseg.engine.predict import encode_masks
from semiseg.errors import UserError
from semiseg.losses.affinity import rgb_to_lab
from semiseg.losses.boxinst import box_cells
from semiseg.models.upsample import aligned_upsample
from tests.benchmark_rows import both_sides, dying, fast, hungry, slow, wrong
from tests.forked import PRELOADED

NAMES = ["mask_losses", "affinity", "dynamic_head", "step", "postprocess", "evaluation", "data"]
KEYS = ["name", "seconds", "baseline_seconds", "speedup", "memory_mb", "baseline_memory_mb", "memory_ratio"]
CPU = torch.device("cpu")

Call = Callable[..., tuple[str, str]]


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """A measurement collects garbage first: a third of a second if it looks at all that has been imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Output and error output of the command."""

    def called(*arguments: str, code: int = 0) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            sys.exit(main(arguments))
        output, errors = capsys.readouterr()
        assert ended.value.code == code, f"{output}\n{errors}"
        return output, errors

    return called


ROW = Row(
    name="made_up",
    sizes={"megabytes": 64},
    tiny={"megabytes": 1},
    passes=3,
    quick_passes=2,
    prepare=fast,
    agree=Close(1e-6),
)


def test_every_row_agrees_with_its_straightforward_formulation_and_the_json_says_so(call: Call) -> None:
    output, errors = call("--tiny", "--json", "-")
    content = json.loads(output)
    assert list(content) == ["device", "scale", "threads", "versions", "git_revision", "rows"]
    assert [row["name"] for row in content["rows"]][: len(NAMES)] == NAMES  # then those of optional packages
    for row in content["rows"]:
        assert list(row)[: len(KEYS) + 1] == [*KEYS, "same_result"]
        assert {"passes", "process_mb", "baseline_process_mb", "sizes"} <= set(row)
        assert row["same_result"] is True, row["name"]
        assert row["speedup"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["memory_ratio"] == pytest.approx(row["memory_mb"] / row["baseline_memory_mb"])
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in KEYS[1:])
    assert content["rows"][NAMES.index("data")]["images_per_second_and_worker"] > 0
    assert ("no GPU" in content["device"]) == (not torch.cuda.is_available())
    assert set(content["versions"]) >= {"python", "torch", "semiseg"}
    assert "mask_losses" in errors  # the table, where it does not disturb


def test_rows_are_chosen_by_name_in_the_order_of_the_table(call: Call) -> None:
    output, _ = call("--tiny", "--only", "dynamic_head", "--only", "affinity")
    lines = [line.split()[0] for line in output.splitlines() if line.strip()]
    assert lines.index("affinity") < lines.index("dynamic_head")
    assert "mask_losses" not in output
    assert "same result" in output
    _, errors = call("--only", "steps", code=2)
    assert "--only steps: no such row; rows here: mask_losses, " in errors
    _, errors = call("--growth", code=2)
    assert "--growth needs --out" in errors
    call("--out", "x", code=2)


def test_a_row_of_a_gpu_or_an_optional_package_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="step_gpu: this machine has no GPU; rows here: mask_losses"):
        chosen_rows(["step_gpu"])
    monkeypatch.setattr(rows, "OPTIONAL_ROWS", (replace(ROW, package="missing"),))
    with pytest.raises(UserError, match="this machine has no missing; rows here"):
        chosen_rows(["made_up"])
    assert chosen_rows([]) == ROWS


def test_a_wrong_result_is_said_and_ends_with_code_1(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(rows, "ROWS", (replace(ROW, name="right"), replace(ROW, name="wrong", prepare=wrong)))
    monkeypatch.setattr(rows, "OPTIONAL_ROWS", ())
    output, errors = call("--tiny", "--json", str(tmp_path / "new" / "bench.json"), code=1)
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [row["same_result"] for row in content["rows"]] == [True, False]
    assert output.splitlines()[-3].endswith("NO")
    assert "results differ from the straightforward formulation: wrong" in errors


def test_time_is_never_a_reason_to_fail(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", (replace(ROW, prepare=slow),))
    monkeypatch.setattr(rows, "OPTIONAL_ROWS", ())
    call("--tiny")


def test_the_table_has_a_line_per_row() -> None:
    values = (0.5, 1.25, 2.5, 100.0, 400.0, 0.25)
    row = {"name": "step", **dict(zip(KEYS[1:], values, strict=True)), "same_result": True}
    assert table_line(row) == ["step", "0.5", "1.25", "2.50x", "100.0", "400.0", "0.250", "yes"]
    assert table_line({**row, "seconds": 123.4})[1] == "123"
    assert as_json([row], scale="quick")["rows"] == [row]


def test_measuring_in_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is what the work holds at its peak, a killed process is one sentence."""
    monkeypatch.setattr(measure, "PRELOADED", PRELOADED)
    measured = measure_row(replace(ROW, prepare=hungry, agree=both_sides), sizes=ROW.sizes, passes=2)
    assert measured["passes"] == 2
    assert measured["same_result"]
    assert measured["memory_mb"] < 16
    assert 60 < measured["baseline_memory_mb"] < 90
    assert measured["sizes"] == {"megabytes": 64}
    with pytest.raises(UserError, match="made_up: the measuring process was ended from outside"):
        measure_row(replace(ROW, prepare=dying), sizes=ROW.sizes, passes=1)


def test_peak_memory_counts_what_was_freed_again() -> None:
    end = peak_memory(CPU)
    torch.ones(2**24).sum()  # 64 MiB
    assert 60 < end()[0] < 100
    end = peak_memory(CPU)
    assert end()[0] < 30


def test_seconds_are_per_unit_and_leave_out_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ticks = [0.0], iter((5.0, 7.0, 0.1, 0.2, 0.3, 0.4))  # the first of each side, at full size, is slow
    monkeypatch.setattr("benchmarks.measure.time.perf_counter", lambda: clock[0])

    def prepare(side: Side, sizes: Sizes, place: Place) -> Task:
        def run() -> dict[str, str]:
            clock[0] += 0.0 if sizes["megabytes"] == 1 else next(ticks)
            return {"side": side}

        return Task(run, units=2)

    row = replace(ROW, prepare=prepare, facts=lambda sizes, seconds: {"units_per_second": 1 / seconds})
    measured = measure_row(row, sizes=ROW.sizes, passes=3, own_processes=False)
    assert measured["seconds"] == pytest.approx((0.1 + 0.3) / 2 / 2)
    assert measured["baseline_seconds"] == pytest.approx((0.2 + 0.4) / 2 / 2)
    assert measured["units_per_second"] == pytest.approx(10)
    assert not measured["same_result"]


def test_results_are_close_or_not() -> None:
    one = {"values": np.array([1.0, -200.0]), "names": ["a"]}
    assert Close(1e-3)(one, {"values": np.array([1.1, -200.0]), "names": ["a"]})  # of the largest
    assert not Close(1e-4)(one, {"values": np.array([1.1, -200.0]), "names": ["a"]})
    assert not Close(1.0)(one, {"values": np.array([1.0, math.nan]), "names": ["a"]})
    assert not Close(1.0)({**one, "values": np.array([1.0, math.inf])}, one)
    assert not Close(1.0)(one, {"values": np.array([1.0]), "names": ["a"]})
    assert not Close(1.0)(one, {**one, "names": ["b"]})
    assert not Close(1.0)(one, {"names": ["a"]})
    assert Close(0.0)({"none": np.zeros(0)}, {"none": np.zeros(0)})


@pytest.mark.parametrize("row", [masks.MASK_LOSSES, masks.DYNAMIC_HEAD], ids=lambda row: row.name)
def test_a_row_notices_a_wrong_gradient(row: Row, tmp_path: Path) -> None:
    workers = [Worker(row, side, row.sizes_at("tiny"), tmp_path) for side in ("ours", "straightforward")]
    for worker in workers:
        worker.measure()
    ours, straightforward = (worker.result() for worker in workers)
    assert row.agree(ours, straightforward)
    for name, values in ours.items():
        changed = values.copy()
        changed.flat[np.abs(values).argmax()] *= 1.01
        assert not row.agree({**ours, name: changed}, straightforward), name


def test_the_step_row_notices_a_wrong_gradient() -> None:
    """Norm and direction of every gradient count, however small it is beside the others."""
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.full((2,), 1e-6)
    agree = step.STEP.agree

    def result() -> dict[str, object]:
        found = step.step_result(torch.ones(5), model)
        return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in found.items()}

    right = result()
    assert agree(result(), right)
    model.bias.grad = torch.full((2,), 2e-6)
    assert not agree(result(), right)
    model.bias.grad = torch.tensor([1e-6, -1e-6])
    assert not agree(result(), right)
    model.bias.grad = None
    assert not agree(result(), right)


def test_postprocess_and_affinity_bear_rounding_and_nothing_more() -> None:
    square = np.zeros((400, 400), dtype=bool)
    square[20:360, 20:360] = True
    given, one_pixel_less, two_less = [], square.copy(), square.copy()
    one_pixel_less[20, 20] = two_less[20, 20:22] = False
    for mask in (square, one_pixel_less, two_less):
        given.append({"rles": encode_masks(torch.from_numpy(mask)[None])})
    assert masks.same_masks(given[1], given[0])  # one of 115 600 pixels
    assert not masks.same_masks(given[2], given[0])
    assert not masks.same_masks({"rles": []}, given[0])
    edges = {"edges": np.ones(10**5), "boxes": np.ones(4)}
    flipped = {**edges, "edges": np.r_[np.zeros(1), np.ones(10**5 - 1)]}
    assert masks.same_edges(flipped, edges)
    assert not masks.same_edges({**edges, "edges": np.r_[np.zeros(2), np.ones(10**5 - 2)]}, edges)
    assert not masks.same_edges({**edges, "boxes": np.zeros(4)}, edges)


def test_boxes_have_the_sizes_of_coco() -> None:
    boxes = coco_like_boxes(64, (800, 1216), seed=0)
    assert bool((boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([1216, 800]) + 1e-3).all())
    cells = box_cells(boxes, stride=4, grid_hw=(200, 304))
    share = ((cells[:, 1] - cells[:, 0]) * (cells[:, 3] - cells[:, 2])).sum() / (64 * 200 * 304)
    assert 0.03 < share < 0.06  # "about 4 % of the cells"
    assert torch.equal(boxes, coco_like_boxes(64, (800, 1216), seed=0))


def test_the_straightforward_parts_follow_the_definitions() -> None:
    rgb = torch.randint(256, (3, 6, 7), dtype=torch.uint8)
    lab = plain.lab(rgb.permute(1, 2, 0).numpy())
    torch.testing.assert_close(torch.from_numpy(lab).permute(2, 0, 1).float(), rgb_to_lab(rgb[None])[0])
    neighbours = plain.neighbours(torch.arange(25.0).view(1, 1, 5, 5), size=3, dilation=2)[0, 0]
    assert neighbours[:, 2, 2].tolist() == [0, 2, 4, 10, 14, 20, 22, 24]
    assert neighbours[:, 0, 0].tolist() == [0, 0, 0, 0, 2, 0, 10, 12]
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(plain.aligned_upsample(maps, 4), aligned_upsample(maps, 4))
    # Cells of stride 4 stand at pixels 2, 6 and 10; the pixels 2 to 6 are in the box, or 3 to 6, or 2 to 5.
    for box, cells in (([2.0, 2, 6, 6], [1, 1, 0]), ([2.9, 2, 6, 6], [1, 1, 0]), ([3.0, 2, 6, 6], [0, 1, 0])):
        assert plain.box_mask(torch.tensor(box), (3, 3), 4)[0].tolist() == cells
    # -log of m n + (1 - m)(1 - n) with m = 1/4 and n = 3/4, and of what is left where the labels differ.
    logits = torch.tensor([[[-math.log(3), math.log(3)]]], dtype=torch.float64)
    for labels, probability in ((None, 3 / 8), ([[[1.0, 1.0]]], 3 / 8), ([[[1.0, 0.0]]], 5 / 8)):
        given = None if labels is None else torch.tensor(labels)
        losses = plain.edge_losses(logits, size=3, dilation=1, labels=given)
        assert losses[0, 4, 0, 0].item() == losses[0, 3, 0, 1].item() == pytest.approx(-math.log(probability))


def test_detections_of_the_evaluation_row_are_neither_perfect_nor_hopeless(tmp_path: Path) -> None:
    work = EVALUATION.prepare("straightforward", EVALUATION.sizes_at("tiny"), Place(CPU, tmp_path))
    numbers = work.result(work.run())
    assert 0.1 < numbers["segm"][0] < numbers["bbox"][0] < 0.95


def test_rows_of_the_gpu_run_on_a_cpu_too() -> None:
    """What can be checked without one: the same functions, bf16 against float32, FLOPs."""
    sizes = STEP_GPU.sizes_at("tiny")
    measured = measure_row(replace(STEP_GPU, device="cpu", facts=None), sizes=sizes, passes=1, own_processes=False)
    assert measured["same_result"]
    facts = step_facts(sizes, seconds=0.5)
    assert facts["images_per_second"] == 2
    assert facts["flops_per_step"] > 1e9
    assert matrix_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert matrix_peak("NVIDIA H100 PCIe") == 756e12
    assert matrix_peak("unheard of") is None
    row = replace(on_gpu(masks.MASK_LOSSES), device="cpu")
    assert row.name == "mask_losses_gpu"
    assert measure_row(row, sizes=row.sizes_at("tiny"), passes=1, own_processes=False)["same_result"]


def test_growth_is_written_as_a_table_and_a_figure(call: Call, tmp_path: Path) -> None:
    output, errors = call("--growth", "--out", str(tmp_path / "benchmarks"), "--tiny")
    with (tmp_path / "benchmarks" / "growth.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["axis"], line["row"], line["value"]) for line in lines] == [
        ("instances", "mask_losses", "2"),
        ("instances", "mask_losses", "4"),
    ]
    assert all(line["same_result"] == "True" and float(line["seconds"]) > 0 for line in lines)
    assert (tmp_path / "benchmarks" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert "2 points in" in output
    assert "mask_losses, instances: 4" in errors
