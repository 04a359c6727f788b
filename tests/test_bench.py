"""`semiseg bench`: the rows compute the same as their straightforward formulations, and the verb says so or fails."""

from __future__ import annotations

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from semiseg.bench import affinity, evaluation, mask_losses, plain_network, postprocess, rows, step
from semiseg.bench.gpu import STEP_ROW, matrix_peak, on_gpu, step_facts
from semiseg.bench.inputs import coco_like_boxes
from semiseg.bench.measure import Measurement, measure_row, measure_sizes
from semiseg.bench.memory import peak_memory_mb
from semiseg.bench.row import Close, Place, Row, Sizes, Task
from semiseg.bench.rows import ROWS, chosen_rows
from semiseg.bench.table import benchmark_json, table_lines
from semiseg.cli import app
from semiseg.engine.predict import encode_masks
from semiseg.errors import UserError
from semiseg.losses.affinity import rgb_to_lab
from semiseg.losses.boxinst import box_cells
from semiseg.models.upsample import aligned_upsample

NAMES = ["mask_losses", "affinity", "dynamic_head", "step", "postprocess", "evaluation", "data"]
KEYS = ["name", "seconds", "baseline_seconds", "speedup", "memory_mb", "baseline_memory_mb", "memory_ratio"]
CPU = torch.device("cpu")


def call(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Output and error output of the verb."""
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.stdout, result.stderr


def task(value: float, seconds: float = 0.0) -> Task:
    """Work that waits and computes one number."""

    def run() -> float:
        time.sleep(seconds)
        return value

    return Task(run, lambda result: {"value": np.array([result])})


def fast(sizes: Sizes, place: Place) -> Task:
    return task(1.0, seconds=0.001)


def slow(sizes: Sizes, place: Place) -> Task:
    return task(1.0, seconds=0.01)


def wrong(sizes: Sizes, place: Place) -> Task:
    return task(1.1)


def hungry(sizes: Sizes, place: Place) -> Task:
    """Work that holds `megabytes` for a moment."""
    return Task(lambda: float(torch.ones(sizes["megabytes"] * 2**18).sum()), lambda total: {"total": np.array(total)})


def dying(sizes: Sizes, place: Place) -> Task:
    def run() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    return Task(run, lambda _: {}) if sizes["megabytes"] > 1 else fast(sizes, place)


ROW = Row(
    name="made_up",
    sizes={"megabytes": 64},
    tiny={"megabytes": 1},
    passes=3,
    quick_passes=2,
    ours=fast,
    straightforward=slow,
    agree=Close(1e-6),
)


def test_every_row_agrees_with_its_straightforward_formulation_and_the_json_says_so() -> None:
    output, errors = call("--tiny", "--json", "-")
    content = json.loads(output)
    assert [row["name"] for row in content["rows"]][: len(NAMES)] == NAMES  # then those of optional packages
    for row in content["rows"]:
        assert list(row)[: len(KEYS) + 1] == [*KEYS, "same_result"]
        assert row["same_result"] is True, row["name"]
        assert row["speedup"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["memory_ratio"] == pytest.approx(row["memory_mb"] / row["baseline_memory_mb"])
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in KEYS[1:])
    assert ("no GPU" in content["device"]) == (not torch.cuda.is_available())
    assert set(content["versions"]) >= {"python", "torch", "semiseg"}
    assert "mask_losses" in errors  # the table, where it does not disturb


def test_rows_are_chosen_by_name_in_the_order_of_the_table() -> None:
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


def test_a_wrong_result_is_said_and_ends_with_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows, "ROWS", (replace(ROW, name="right"), replace(ROW, name="wrong", ours=wrong)))
    monkeypatch.setattr(rows, "OPTIONAL_ROWS", ())
    output, errors = call("--tiny", "--json", str(tmp_path / "new" / "bench.json"), code=1)
    content = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [row["same_result"] for row in content["rows"]] == [True, False]
    assert output.splitlines()[-4].endswith("NO")
    assert "results differ from the straightforward formulation: wrong" in errors


def test_time_is_never_a_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", (replace(ROW, ours=slow, straightforward=fast),))
    monkeypatch.setattr(rows, "OPTIONAL_ROWS", ())
    call("--tiny")


def test_the_table_has_a_line_per_row() -> None:
    sizes, facts = {"images": 2}, {"images_per_second": 4.0}
    measured = Measurement("step", sizes, 3, 0.5, 1.25, 100.0, 400.0, 700.0, 1000.0, True, facts)
    assert table_lines([measured]) == [["step", "0.5", "1.25", "2.50x", "100.0", "400.0", "0.250", "yes"]]
    row = benchmark_json([measured], scale="quick")["rows"][0]
    assert (row["speedup"], row["memory_ratio"], row["images_per_second"]) == (2.5, 0.25, 4.0)
    assert row["sizes"] == {"images": 2}


def test_measuring_in_own_processes() -> None:
    """Memory is what the work holds at its peak, a killed process is one sentence."""
    measured = measure_row(replace(ROW, straightforward=hungry, agree=always), scale="quick")
    assert measured.passes == 2
    assert measured.memory_mb < 16
    assert 60 < measured.baseline_memory_mb < 90
    with pytest.raises(UserError, match="bench made_up: the measuring process ended with code -9"):
        measure_sizes(replace(ROW, ours=dying), ROW.sizes, passes=1)


def always(ours: object, straightforward: object) -> bool:
    return True


def test_peak_memory_counts_what_was_freed_again() -> None:
    end = peak_memory_mb(CPU)
    torch.ones(2**24).sum()  # 64 MiB
    assert 60 < end().added < 100
    end = peak_memory_mb(CPU)
    assert end().added < 30


def test_seconds_are_per_unit_and_leave_out_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ticks = [0.0], iter((5.0, 0.1, 0.3))  # the first, at full size, is slow
    monkeypatch.setattr("semiseg.bench.measure.time.perf_counter", lambda: clock[0])

    def prepare(sizes: Sizes, place: Place) -> Task:
        def run() -> None:
            clock[0] += 0.0 if sizes["megabytes"] == 1 else next(ticks)

        return Task(run, lambda _: {}, units=2)

    measured = measure_row(replace(ROW, ours=prepare), scale="full", own_processes=False)
    assert measured.seconds == pytest.approx((0.1 + 0.3) / 2 / 2)
    assert not measured.same_result  # nothing was computed


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


@pytest.mark.parametrize("row", [row for row in ROWS if row.name in ("mask_losses", "dynamic_head")])
def test_a_row_notices_a_wrong_gradient(row: Row, tmp_path: Path) -> None:
    result = {}
    for side in ("ours", "straightforward"):
        (tmp_path / side).mkdir()
        work = row.task(side, row.sizes_at("tiny"), tmp_path / side)
        result[side] = work.result(work.run())
    assert row.agree(result["ours"], result["straightforward"])
    for name, values in result["ours"].items():
        if isinstance(values, np.ndarray):
            changed = values.copy()
            changed.flat[np.abs(values).argmax()] *= 1.01
            assert not row.agree({**result["ours"], name: changed}, result["straightforward"]), name


def test_the_step_row_notices_a_wrong_gradient() -> None:
    """Norm and direction of every gradient count, however small it is beside the others."""
    model = torch.nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.full((2,), 1e-6)
    losses, agree = torch.ones(5), step.ROW.agree
    right = step._result(losses, model)
    assert agree(step._result(losses, model), right)
    model.bias.grad = torch.full((2,), 2e-6)
    assert not agree(step._result(losses, model), right)
    model.bias.grad = torch.tensor([1e-6, -1e-6])
    assert not agree(step._result(losses, model), right)
    model.bias.grad = None
    assert not agree(step._result(losses, model), right)


def test_postprocess_and_affinity_bear_rounding_and_nothing_more() -> None:
    square = np.zeros((400, 400), dtype=bool)
    square[20:360, 20:360] = True
    masks, one_pixel_less, two_less = [], square.copy(), square.copy()
    one_pixel_less[20, 20] = two_less[20, 20:22] = False
    for mask in (square, one_pixel_less, two_less):
        masks.append({"rles": encode_masks(torch.from_numpy(mask)[None])})
    assert postprocess._agree(masks[1], masks[0])  # one of 115 600 pixels
    assert not postprocess._agree(masks[2], masks[0])
    assert not postprocess._agree({"rles": []}, masks[0])
    edges = {"edges": np.ones(10**5), "boxes": np.ones(4)}
    flipped = {**edges, "edges": np.r_[np.zeros(1), np.ones(10**5 - 1)]}
    assert affinity._agree(flipped, edges)
    assert not affinity._agree({**edges, "edges": np.r_[np.zeros(2), np.ones(10**5 - 2)]}, edges)
    assert not affinity._agree({**edges, "boxes": np.zeros(4)}, edges)


def test_boxes_have_the_sizes_of_coco() -> None:
    boxes = coco_like_boxes(64, (800, 1216), seed=0)
    assert bool((boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= torch.tensor([1216, 800]) + 1e-3).all())
    cells = box_cells(boxes, stride=4, grid_hw=(200, 304))
    share = ((cells[:, 1] - cells[:, 0]) * (cells[:, 3] - cells[:, 2])).sum() / (64 * 200 * 304)
    assert 0.03 < share < 0.06  # "about 4 % of the cells"
    assert torch.equal(boxes, coco_like_boxes(64, (800, 1216), seed=0))


def test_the_straightforward_parts_follow_the_definitions() -> None:
    rgb = torch.randint(256, (3, 6, 7), dtype=torch.uint8)
    lab = affinity.numpy_lab(rgb.permute(1, 2, 0).numpy())
    torch.testing.assert_close(torch.from_numpy(lab).permute(2, 0, 1).float(), rgb_to_lab(rgb[None])[0])
    maps = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(plain_network.aligned(maps, 4), aligned_upsample(maps, 4))
    neighbours = mask_losses.unfold_neighbours(torch.arange(25.0).view(1, 1, 5, 5), 3, 2)[0, 0]
    assert neighbours[:, 2, 2].tolist() == [0, 2, 4, 10, 14, 20, 22, 24]
    assert neighbours[:, 0, 0].tolist() == [0, 0, 0, 0, 2, 0, 10, 12]


def test_detections_of_the_evaluation_row_are_neither_perfect_nor_hopeless(tmp_path: Path) -> None:
    work = evaluation.ROW.task("straightforward", evaluation.ROW.sizes_at("tiny"), tmp_path)
    numbers = work.result(work.run())
    assert 0.1 < numbers["segm"][0] < numbers["bbox"][0] < 0.95


def test_rows_of_the_gpu_run_on_a_cpu_too(tmp_path: Path) -> None:
    """What can be checked without one: the same functions, bf16 against float32, FLOPs."""
    sizes = STEP_ROW.sizes_at("tiny")
    measured = measure_row(replace(STEP_ROW, device="cpu", facts=None), scale="tiny", own_processes=False)
    assert measured.same_result
    facts = step_facts(sizes, seconds=0.5)
    assert facts["images_per_second"] == 4
    assert facts["flops_per_step"] > 1e9
    assert matrix_peak("NVIDIA H100 80GB HBM3") == 989e12
    assert matrix_peak("NVIDIA H100 PCIe") == 756e12
    assert matrix_peak("unheard of") is None
    row = replace(on_gpu(mask_losses.ROW), device="cpu")
    assert row.name == "mask_losses_gpu"
    assert measure_row(row, scale="tiny", own_processes=False).same_result


def test_growth_is_written_as_a_table_and_a_figure(tmp_path: Path) -> None:
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
