"""The host never waits for the device within a step: shown without a GPU, on fake tensors that claim to be on one.

A fake tensor has a shape, a type and a device but no values: whatever would read a value back (`.item()`, `bool`,
`nonzero`, an index of bools, `repeat_interleave` without its size) raises, and so does an operation on two devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from semiseg.config import RunConfig
from semiseg.engine import train as training
from semiseg.engine.build import build_data, build_step
from semiseg.engine.step import StepPlan, TrainStep
from semiseg.models.detectors.sample import sample_positives
from semiseg.structures.inputs import Batch, Supervision, Targets
from semiseg.structures.transfer import send
from tests.tiny import tiny_config

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
SIDE, CLASSES = 64, 5
MIXED = [Supervision.BOX, Supervision.MASK, Supervision.MASK, Supervision.BOX, Supervision.BOX]
OBJECTIVES = [
    ("dice", "projection+pairwise"),
    ("labelled", "projection+pairwise"),
    ("dice", "projection+learned"),
    ("dice", "box_as_mask"),
    ("crop_bce", "projection+pairwise"),
]


def make_batch(supervision: list[Supervision]) -> Batch:
    generator = torch.Generator().manual_seed(3)
    count, with_mask = len(supervision), [n for n, kind in enumerate(supervision) if kind != Supervision.BOX]
    corner = torch.rand(count, 2, generator=generator) * 30
    return Batch(
        images=torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator),
        image_sizes_hw=torch.tensor([[SIDE, SIDE], [50, 60]]),
        image_ids=(1, 2),
        bottom_rows_without_affinity=torch.tensor([0, 3]),
        targets=Targets(
            boxes_xyxy=torch.cat([corner, corner + 20], dim=1),
            labels=torch.arange(count) % CLASSES,
            image_index=torch.arange(count) * 2 // max(count, 1),
            supervision=torch.tensor([int(kind) for kind in supervision], dtype=torch.int64),
            masks=torch.rand(len(with_mask), SIDE // 4, SIDE // 4, generator=generator) > 0.5,
            mask_instance=torch.tensor(with_mask, dtype=torch.int64),
            mask_weight=torch.ones(len(with_mask)),
            crowd_boxes_xyxy=torch.tensor([[30.0, 30.0, 50.0, 50.0]]),
            crowd_image_index=torch.tensor([1]),
            mask_stride=4,
        ),
    )


def objective_of(mask: str, box: str) -> dict[str, str]:
    return {"mask": mask, "box": box, "affinity": "learned" if box == "projection+learned" else "colour"}


class Transfers(TorchDispatchMode):
    """Counts operations with tensors on both sides; a number that is a tensor on the CPU costs nothing and is none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        if len({leaf.device for leaf in leaves if isinstance(leaf, Tensor)}) > 1:
            self.names.append(str(func))
        return result


def as_fake(mode: FakeTensorMode, item: Any) -> Any:
    """The same structure of fake tensors, still on the host."""
    if isinstance(item, Tensor):
        return mode.from_tensor(item)
    if isinstance(item, tuple):
        return tuple(as_fake(mode, value) for value in item)
    if isinstance(item, dict):
        return {key: as_fake(mode, value) for key, value in item.items()}
    if is_dataclass(item) and not isinstance(item, type):
        return replace(item, **{field.name: as_fake(mode, getattr(item, field.name)) for field in fields(item)})
    return item


def tensors_in(item: Any) -> int:
    if is_dataclass(item):
        return sum(tensors_in(getattr(item, field.name)) for field in fields(item))
    if isinstance(item, (dict, tuple)):
        return sum(map(tensors_in, item.values() if isinstance(item, dict) else item))
    return int(isinstance(item, Tensor))


class Planned(NamedTuple):
    """A batch of fake tensors, its plan, the operations across devices, and how many tensors were sent."""

    batch: Batch
    plan: StepPlan
    transfers: Transfers
    sent: int


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)  # fake tensors know no pinned memory
    return FakeTensorMode()


def fake_step(mode: FakeTensorMode, config: RunConfig, device: torch.device) -> TrainStep:
    with mode, device:
        return build_step(config, num_classes=CLASSES).train()


@contextmanager
def plan_of(mode: FakeTensorMode, step: TrainStep, batch: Batch, device: torch.device) -> Iterator[Planned]:
    """The plan of a batch on that device, inside `mode`: tensors are real until they are sent, then fake."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        transfers, sent = Transfers(), []

        def send_fake(structure: Any, device: torch.device) -> Any:
            stack.enter_context(mode)
            sent.append(tensors_in(structure))
            stack.enter_context(transfers)
            return send(as_fake(mode, structure), device)

        with mode:
            on_device = as_fake(mode, batch).to(device, non_blocking=True)
        patch.setattr("semiseg.engine.step.send", send_fake)
        plan = step.plan(on_device, batch)
        yield Planned(on_device, plan, transfers, sum(sent))


@pytest.mark.parametrize(
    ("mask", "box", "supervision"),
    [*[(*objective, MIXED) for objective in OBJECTIVES], (*OBJECTIVES[0], MIXED[:1]), (*OBJECTIVES[0], [])],
)
def test_a_step_reads_nothing_back(
    mode: FakeTensorMode, tmp_path: Path, mask: str, box: str, supervision: list[Supervision]
) -> None:
    config = tiny_config(tmp_path, objective=objective_of(mask, box))
    step = fake_step(mode, config, CUDA)
    with plan_of(mode, step, make_batch(supervision), CUDA) as (batch, plan, transfers, sent):
        assert sent > 0
        assert transfers.names == ["aten._to_copy.default"] * sent, "what is sent, and that is all"
        terms = step(batch, plan, plan.counts, warmup=0.5, processes=1)
        assert len(transfers.names) == sent
        assert terms.total.device == CUDA


@pytest.mark.parametrize(("mask", "box"), OBJECTIVES[:3])
def test_nor_does_its_backward(mode: FakeTensorMode, tmp_path: Path, mask: str, box: str) -> None:
    """On the CPU, since autograd asks a GPU for its queue; what would be read back raises there too."""
    config = tiny_config(tmp_path, objective=objective_of(mask, box))
    step = fake_step(mode, config, CPU)
    with plan_of(mode, step, make_batch(MIXED), CPU) as (batch, plan, _, _):
        step(batch, plan, plan.counts, warmup=0.5, processes=1).total.backward()
    assert all(parameter.grad is not None for parameter in step.model.parameters() if parameter.requires_grad)


def test_what_is_read_back_is_seen(mode: FakeTensorMode, tmp_path: Path) -> None:
    """The control: without the host's numbers the same functions read them from the device, and that raises."""
    step = fake_step(mode, tiny_config(tmp_path), CUDA)
    seen = (DataDependentOutputException, DynamicOutputShapeException)
    with plan_of(mode, step, make_batch(MIXED), CUDA) as (batch, plan, _, _):
        targets = batch.targets
        assert targets is not None
        outputs = step.model(batch.images, batch.image_sizes_hw)
        with pytest.raises(seen):
            sample_positives(outputs, plan.assignment, targets, plan.quotas)
        queries = sample_positives(outputs, plan.assignment, targets, plan.quotas, counts=plan.queries)
        with pytest.raises(seen):
            step.model.predict_masks(outputs, replace(queries, counts=None))
        without_sizes = replace(plan, mask_targets=replace(plan.mask_targets, sizes=None))
        with pytest.raises(seen):
            step(batch, without_sizes, plan.counts, warmup=0.5, processes=1)


class Reads(TorchDispatchMode):
    """Counts the values that the host reads of tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.count = 0
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += reads and not self.paused
        return func(*args, **(kwargs or {}))


def test_an_update_waits_once_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the check that the loss is finite; what is read before the plan is sent is on the host."""
    config = tiny_config(tmp_path)
    state = training.prepare(config, build_data(config), Accelerator(cpu=True))
    state.wrapped.train()
    reads, plan = Reads(), state.step_module.plan

    def sent_from_here(structure: Any, device: torch.device) -> Any:
        reads.paused = False
        return send(structure, device)

    def uncounted(batch: Batch, loaded: Batch) -> StepPlan:
        reads.paused = True
        return plan(batch, loaded)

    monkeypatch.setattr("semiseg.engine.step.send", sent_from_here)
    monkeypatch.setattr(state.step_module, "plan", uncounted)
    with reads:
        assert training.optimizer_step(state, [make_batch(MIXED)], out=tmp_path) is not None
    assert reads.count == 1
