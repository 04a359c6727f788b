"""A mask head that is no product: one box-shaped mask per query, each on a region of its own.

It goes through the same code as CondInst's: nothing outside `semiseg/models` knows which of them it trains.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import semiseg
from semiseg.config import ModelConfig
from semiseg.engine.build import build_data, build_step, build_training_loader
from semiseg.engine.logs import read_log
from semiseg.engine.run import evaluate_run, execute_run
from semiseg.errors import UserError
from semiseg.models import build
from semiseg.models.detectors.fcos import flatten_levels
from semiseg.models.masks.head import MaskHead
from semiseg.structures.grids import Regions
from semiseg.structures.outputs import MaskLogits, MaskQueries, Outputs
from tests.test_poison import everything, make_data
from tests.tiny import tiny_config


class BoxMasks(MaskHead):
    """Learns how far each side of a mask stands from that of its box, in a region a quarter larger than the box."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sides = nn.Linear(channels, 4)

    def forward(self, levels: Mapping[int, Tensor], box_towers: Sequence[Tensor]) -> Tensor:
        return flatten_levels(box_towers)

    def grid(self, boxes_xyxy: Tensor, padded_size_hw: tuple[int, int]) -> Regions:
        centre, half = boxes_xyxy[:, :2] + boxes_xyxy[:, 2:], (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).clamp(min=1)
        return Regions(torch.cat([centre / 2 - 0.625 * half, centre / 2 + 0.625 * half], dim=1), (14, 14))

    def predict_masks(self, outputs: Outputs, queries: MaskQueries) -> MaskLogits:
        left, top, right, bottom = self.sides(outputs.mask_inputs[queries.image_index, queries.location_index]).unbind(
            1
        )
        at = (torch.arange(14, device=left.device) + 0.5) / 14 * 2 - 1  # where a box reaches from -0.8 to 0.8
        across = torch.minimum(at - left[:, None] + 0.8, 0.8 + right[:, None] - at)
        down = torch.minimum(at - top[:, None] + 0.8, 0.8 + bottom[:, None] - at)
        logits = 8 * torch.minimum(down[:, :, None], across[:, None, :])
        return MaskLogits(logits, queries.image_index, queries.instance_index, self.grid(queries.boxes_xyxy, (0, 0)))

    def freeze(self) -> None:
        self.requires_grad_(False)


@pytest.fixture(autouse=True)
def _second_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_it(config: ModelConfig, *, num_classes: int) -> MaskHead:
        return BoxMasks(config.neck.channels)

    monkeypatch.setattr(build, "build_mask_head", build_it)
    monkeypatch.setattr("semiseg.engine.build.mask_stride", lambda config: None)


def test_what_needs_masks_of_whole_images_is_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, objective={"box": "projection", "level_set": 0.1})
    with pytest.raises(UserError, match=r"objective\.level_set needs masks on whole images"):
        build_step(config, num_classes=2)
    config = tiny_config(tmp_path, objective={"box": "projection+learned", "affinity": "learned"})
    with pytest.raises(UserError, match=r"objective\.affinity = 'learned' needs a mask head with features of whole"):
        build_step(config, num_classes=2)


KNOW_HEADS = ("models", "interop", "config")  # the last one as the kind of a table
OBJECTIVES: list[dict[str, Any]] = [{"mask": "dice", "box": "projection+pairwise"}, {"mask": "labelled", "box": "none"}]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=["dice and pairwise", "labelled"])
def test_it_learns_from_every_kind_of_supervision(tmp_path: Path, objective: dict[str, Any]) -> None:
    config = tiny_config(tmp_path, objective=objective)
    data = build_data(config)
    torch.manual_seed(0)
    step = build_step(config, num_classes=len(data.train.class_names)).train()
    (batch,) = build_training_loader(config, data, steps=1, start_step=0, processes=1, rank=0, pin_memory=False)
    plan = step.plan(batch)
    optimizer = torch.optim.Adam(step.parameters(), lr=0.01)
    totals = []
    for _ in range(12):
        terms = step(batch, plan, plan.counts, warmup=1.0, processes=1)
        terms.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append({name: float(value.detach()) for name, value in terms.unweighted.items()})
    used = {name for name, value in totals[0].items() if value > 0} - {"classification", "box", "centreness"}
    assert used == (
        {"dice", "projection", "pairwise"} if objective["mask"] == "dice" else {"projection", "pairwise_labelled"}
    )
    for name in used:
        assert totals[-1][name] < totals[0][name], name


def test_it_trains_resumes_and_is_evaluated(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, runtime={"checkpoint_every": 2})
    execute_run(config, out=tmp_path / "whole", progress=False)
    execute_run(config, out=tmp_path / "cut", progress=False)
    for name in ("checkpoints/step_00000004.pt", "result.json"):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "model")
    execute_run(config, out=tmp_path / "cut", progress=False)
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]
    lines = [line for line in read_log(tmp_path / "whole" / "log.jsonl") if "losses" in line]
    assert any(line["losses"]["dice"] > 0 for line in lines)
    assert evaluate_run(tmp_path / "whole", progress=False) is not None
    picture = torch.zeros(3, 40, 56, dtype=torch.uint8)
    (detections,) = semiseg.detect(semiseg.load_model(tmp_path / "whole"), [picture], score_threshold=0.0)
    assert detections.masks.shape[1:] == (40, 56)


def test_withheld_masks_change_nothing(tmp_path: Path) -> None:
    clean = everything(make_data(tmp_path / "clean", poisoned=False))
    poisoned = everything(make_data(tmp_path / "poisoned", poisoned=True))
    for mine, theirs in zip(clean[0], poisoned[0], strict=True):
        assert mine.targets is not None
        assert theirs.targets is not None
        assert mine.targets.encoded is not None
        assert theirs.targets.encoded is not None
        assert torch.equal(mine.targets.encoded.changes, theirs.targets.encoded.changes)
    targets = [batch.targets for batch in clean[0] if batch.targets]
    assert 0 < sum(len(each.mask_instance) for each in targets) < sum(each.num_instances for each in targets)
    assert clean[1] == poisoned[1]
    assert torch.equal(clean[2], poisoned[2])


def test_without_instances_every_parameter_is_on_the_graph(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    model = build.build_model(config.model, num_classes=3)
    outputs = model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[64, 64]]))
    nothing = torch.zeros(0, dtype=torch.int64)
    masks = model.predict_masks(outputs, MaskQueries(nothing, nothing, nothing, torch.zeros(0, 4), nothing))
    masks.logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.mask_head.parameters())


def test_only_models_and_the_reader_of_released_checkpoints_know_condinst() -> None:
    package = Path(semiseg.__file__).parent
    files = [path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in KNOW_HEADS]
    assert len(files) > 50
    assert [str(path) for path in files if re.search(r"masks\.dynamic|Dynamic[A-Z]\w+", path.read_text())] == []
