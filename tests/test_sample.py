"""Sampling of the positives that get a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import straightforward as plain
from semiseg.models.detectors.fcos import make_locations
from semiseg.models.detectors.sample import mask_quotas, rank_in_group, sample_positives
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import Assignment, DenseOutputs
from tests.tiny import box_targets


def make_assignment(counts: list[int], image_of: list[int], num_locations: int) -> Assignment:
    """`counts[i]` positives of instance i, at the next free locations of its image."""
    image_index: list[int] = []
    location_index: list[int] = []
    instance_index: list[int] = []
    used = [0] * (max(image_of, default=-1) + 1)
    for instance, (count, image) in enumerate(zip(counts, image_of, strict=True)):
        image_index += [image] * count
        instance_index += [instance] * count
        location_index += range(used[image], used[image] + count)
        used[image] += count
    assert max(used, default=0) <= num_locations
    total = len(image_index)
    return Assignment(
        image_index=torch.tensor(image_index, dtype=torch.int64),
        location_index=torch.tensor(location_index, dtype=torch.int64),
        instance_index=torch.tensor(instance_index, dtype=torch.int64),
        box_distances=torch.ones(total, 4),
        centreness=torch.ones(total),
        ignored=torch.zeros(max(len(used), 1), num_locations, dtype=torch.bool),
    )


def make_outputs(class_logits: Tensor, centreness_logits: Tensor) -> DenseOutputs:
    batch, count = centreness_logits.shape
    return DenseOutputs(
        class_logits=class_logits,
        box_distances=torch.ones(batch, count, 4),
        centreness_logits=centreness_logits,
        locations=make_locations([(1, count)], [8], torch.device("cpu")),
        mask_inputs=None,
    )


def two_boxes() -> Targets:
    return box_targets([[1, 1, 9, 9], [2, 2, 9, 9]], [0, 0])


def quotas_of(counts: list[int], image_of: list[int], num_images: int, limit: int = 64) -> list[int]:
    return mask_quotas(
        make_assignment(counts, image_of, num_locations=1000),
        num_instances=len(counts),
        num_images=num_images,
        image_index=torch.tensor(image_of, dtype=torch.int64),
        max_positives=limit,
    ).tolist()


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ([70], 64, [64]),
        ([9, 9, 4], 64, [9, 9, 4]),  # 21 each, all have fewer
        ([30, 30, 4], 64, [21, 21, 4]),  # what the third leaves over is not passed on
        ([30, 0, 30], 64, [30, 0, 30]),  # an instance without positives takes no share: G = 2, 32 each
        ([9] * 40, 64, [1] * 40),  # 64 // 40
        ([2, 3, 1, 3, 1], 3, [1, 1, 0, 1, 0]),  # G = 5 > 3: the three with most positives
        ([2, 2, 2, 2], 3, [1, 1, 1, 0]),  # ties to the first
        ([], 64, []),
    ],
)
def test_quotas_of_one_image(counts: list[int], limit: int, expected: list[int]) -> None:
    assert quotas_of(counts, [0] * len(counts), 1, limit) == expected


def test_64_is_a_cap_for_100_boxes() -> None:
    counts = [5 if number % 2 else 3 for number in range(100)]
    quotas = quotas_of(counts, [0] * 100, 1)
    assert sum(quotas) == 64
    assert [quotas[number] for number in range(1, 100, 2)] == [1] * 50
    assert [number for number in range(0, 100, 2) if quotas[number]] == list(range(0, 28, 2))


def test_images_have_quotas_of_their_own() -> None:
    assert quotas_of([40, 40, 40, 0, 80], [0, 0, 2, 2, 3], num_images=5) == [32, 32, 40, 0, 64]


def test_best_positives_by_probability_times_centreness() -> None:
    # instance 0: locations 0..3, instance 1: 4..5; the second class is the best one everywhere
    probability = torch.tensor([[0.5, 0.9, 0.6, 0.9, 0.2, 0.3]])
    centreness = torch.tensor([[0.8, 0.5, 0.7, 0.4, 0.9, 0.9]])  # products .40 .45 .42 .36 | .18 .27
    class_logits = torch.stack([torch.full_like(probability, -9.0), probability.logit()], dim=-1)
    queries = sample_positives(
        make_outputs(class_logits, centreness.logit()),
        make_assignment([4, 2], [0, 0], num_locations=6),
        two_boxes(),
        torch.tensor([2, 1]),
    )
    assert queries.location_index.tolist() == [1, 2, 5]
    assert queries.instance_index.tolist() == [0, 0, 1]
    assert queries.image_index.tolist() == [0, 0, 0]
    assert queries.boxes_xyxy[:, 0].tolist() == [1, 1, 2]
    assert queries.labels.tolist() == [0, 0, 0]


def test_equal_scores_take_the_lower_location() -> None:
    outputs = make_outputs(torch.zeros(1, 6, 3), torch.zeros(1, 6))
    queries = sample_positives(
        outputs, make_assignment([3, 3], [0, 0], num_locations=6), two_boxes(), torch.tensor([2, 1])
    )
    assert queries.location_index.tolist() == [0, 1, 3]


def test_equals_the_straightforward_formulation() -> None:
    generator = torch.Generator().manual_seed(11)
    counts = torch.randint(0, 12, (30,), generator=generator).tolist()
    image_of = sorted(torch.randint(0, 4, (30,), generator=generator).tolist())
    assignment = make_assignment(counts, image_of, num_locations=200)
    outputs = make_outputs(torch.randn(4, 200, 5, generator=generator), torch.randn(4, 200, generator=generator))
    limit = 16
    matched = torch.full((4, 200), -1)
    matched[assignment.image_index, assignment.location_index] = assignment.instance_index
    expected = plain.sample(
        outputs.class_logits.sigmoid().amax(2) * outputs.centreness_logits.sigmoid(), matched, limit
    )
    quotas = mask_quotas(
        assignment,
        num_instances=30,
        num_images=4,
        image_index=torch.tensor(image_of),
        max_positives=limit,
    )
    queries = sample_positives(outputs, assignment, box_targets([[0, 0, 1, 1]] * 30, image_of), quotas)
    found = torch.stack([queries.image_index, queries.location_index, queries.instance_index], dim=1).tolist()
    assert len(expected) > 40
    assert [tuple(row) for row in found] == expected
    assert torch.equal(torch.bincount(queries.instance_index, minlength=30), quotas)


def test_without_positives() -> None:
    outputs = make_outputs(torch.zeros(1, 6, 3), torch.zeros(1, 6))
    queries = sample_positives(
        outputs, make_assignment([0, 0], [0, 0], num_locations=6), two_boxes(), torch.zeros(2).long()
    )
    assert queries.image_index.shape == (0,)


def test_rank_in_group() -> None:
    assert rank_in_group(torch.tensor([0, 0, 3, 5, 5, 5])).tolist() == [0, 1, 0, 0, 1, 2]
