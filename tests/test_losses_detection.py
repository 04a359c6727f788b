"""The detector's losses: straightforward formulations, gradcheck, ignored locations, nothing to detect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torchvision.ops import sigmoid_focal_loss

from benchmarks import straightforward as plain
from semiseg.losses.detection import detection_losses, generalised_iou
from semiseg.structures.outputs import Assignment, DenseOutputs, Locations

B, R, C = 2, 7, 3


def random_outputs(dtype: torch.dtype = torch.float64) -> DenseOutputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    places = Locations(torch.zeros(R, 2), torch.ones(R), torch.zeros(R, dtype=torch.int64), counts=(R,))
    return DenseOutputs(
        class_logits=draw(B, R, C).requires_grad_(),
        box_distances=draw(B, R, 4).abs().mul(3).detach().requires_grad_(),
        centreness_logits=draw(B, R).requires_grad_(),
        locations=places,
        mask_inputs=None,
    )


def make_assignment(image: list[int], place: list[int], instance: list[int]) -> Assignment:
    generator = torch.Generator().manual_seed(1)
    ignored = torch.zeros(B, R, dtype=torch.bool)
    ignored[1, 4:] = True
    return Assignment(
        image_index=torch.tensor(image, dtype=torch.int64),
        location_index=torch.tensor(place, dtype=torch.int64),
        instance_index=torch.tensor(instance, dtype=torch.int64),
        box_distances=torch.rand(len(image), 4, generator=generator) * 4 + 0.1,
        centreness=torch.rand(len(image), generator=generator),
        ignored=ignored,
    )


POSITIVES = ([0, 0, 1], [1, 5, 2], [0, 1, 2])
LABELS = torch.tensor([2, 0, 1])


def focal(class_logits: Tensor, assignment: Assignment) -> Tensor:
    """torchvision's, in float64, summed over what is not ignored."""
    targets = torch.zeros(B, R, C, dtype=torch.float64)
    targets[assignment.image_index, assignment.location_index, LABELS[assignment.instance_index]] = 1
    every: Tensor = sigmoid_focal_loss(class_logits.double(), targets, alpha=0.25, gamma=2.0)
    return every[~assignment.ignored].sum()


def test_sums_equal_the_straightforward_formulation() -> None:
    outputs, assignment = random_outputs(), make_assignment(*POSITIVES)
    losses = detection_losses(outputs, assignment, LABELS)
    gious = plain.generalised_iou(outputs.box_distances[POSITIVES[:2]], assignment.box_distances.double())
    box, centreness = torch.zeros(()).double(), torch.zeros(()).double()
    for p, (b, r) in enumerate(zip(*POSITIVES[:2], strict=True)):
        target = assignment.centreness[p].double()
        box += target * (1 - gious[p])
        m = outputs.centreness_logits[b, r].sigmoid()
        centreness += -(target * torch.log(m) + (1 - target) * torch.log(1 - m))
    classification = focal(outputs.class_logits, assignment)
    torch.testing.assert_close(losses["classification"], classification, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["box"], box, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses["centreness"], centreness, rtol=1e-12, atol=0)
    assert list(losses) == ["classification", "box", "centreness"]


def test_classification_gradcheck_and_extreme_logits() -> None:
    outputs, assignment = random_outputs(), make_assignment(*POSITIVES)

    def classification(logits: Tensor) -> Tensor:
        return detection_losses(replace(outputs, class_logits=logits), assignment, LABELS)["classification"]

    logits = outputs.class_logits.detach().double().requires_grad_()
    assert gradcheck(classification, logits)
    for value in (-1e4, -100.0, 100.0, 1e4):
        extreme = torch.full_like(logits, value, dtype=torch.float32).requires_grad_()
        loss = classification(extreme)
        (gradient,) = torch.autograd.grad(loss, extreme)
        # sure and wrong costs |x|: at every object if all say no, everywhere else if all say yes
        wrong = len(POSITIVES[0]) * 0.25 if value < 0 else (int((~assignment.ignored).sum()) * C - len(LABELS)) * 0.75
        assert loss.item() == pytest.approx(abs(value) * wrong, rel=1e-5)
        assert gradient.abs().sum().item() == pytest.approx(wrong, rel=1e-5)


def test_generalised_iou_by_hand() -> None:
    target = torch.tensor([[1.0, 1, 1, 1]])  # a 2 x 2 box around the point
    assert generalised_iou(target, target).item() == 1
    # 4 x 2 around it: I = 4, U = 8, A = 8 -> (4 + 1) / (8 + 1).
    assert generalised_iou(torch.tensor([[2.0, 1, 2, 1]]), target).item() == pytest.approx(5 / 9)
    # 4 x 1 through it: I = 2, U = 4 + 4 - 2 = 6, A = 4 * 2 = 8 -> 3 / 7 - 2 / 8.
    assert generalised_iou(torch.tensor([[2.0, 0.5, 2, 0.5]]), target).item() == pytest.approx(3 / 7 - 0.25)
    # Nothing predicted: I = 0, U = A = 4 -> 1 / 5.
    assert generalised_iou(torch.zeros(1, 4), target).item() == pytest.approx(0.2)


def test_generalised_iou_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = (torch.rand(12, 4, generator=generator, dtype=torch.float64) * 5).requires_grad_()
    target = torch.rand(12, 4, generator=generator, dtype=torch.float64) * 5 + 0.1
    assert gradcheck(generalised_iou, (predicted, target))


def test_ignored_locations_are_neither_object_nor_background() -> None:
    outputs, assignment = random_outputs(), make_assignment(*POSITIVES)
    detection_losses(outputs, assignment, LABELS)["classification"].backward()
    gradient = outputs.class_logits.grad
    assert gradient is not None
    assert torch.equal((gradient != 0).all(2), ~assignment.ignored)


def test_an_image_without_objects_still_learns_background() -> None:
    outputs, assignment = random_outputs(), make_assignment([], [], [])
    losses = detection_losses(outputs, assignment, LABELS[:0])
    sum(losses.values(), torch.zeros(())).backward()
    assert losses["classification"] > 0
    assert (losses["box"].item(), losses["centreness"].item()) == (0, 0)
    for prediction in (outputs.box_distances, outputs.centreness_logits):
        assert prediction.grad is not None
        assert torch.equal(prediction.grad, torch.zeros_like(prediction))
    expected = focal(outputs.class_logits.detach(), assignment)
    torch.testing.assert_close(losses["classification"].detach(), expected, rtol=1e-12, atol=0)


def test_half_precision_is_computed_in_float32() -> None:
    half, assignment = random_outputs(torch.bfloat16), make_assignment(*POSITIVES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = detection_losses(half, assignment, LABELS)
    expected = focal(half.class_logits.detach(), assignment)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    torch.testing.assert_close(losses["classification"].double(), expected, rtol=1e-6, atol=0)
