"""The whole network: sizes against the reference's, what is frozen, what carries gradients, and its variants."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from semiseg.config import ModelConfig
from semiseg.engine.checkpoint import load_initial
from semiseg.models.build import build_model
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.fcos import flatten_levels
from semiseg.models.detectors.sample import mask_quotas, sample_positives
from semiseg.models.norms import FrozenNorm
from semiseg.models.resnet import ResNetFeatures
from semiseg.models.segmenter import FORMER_NAMES, Segmenter
from semiseg.structures.grids import WholeMap
from semiseg.structures.inputs import Targets
from semiseg.structures.outputs import DenseOutputs
from tests.tiny import TINY, box_targets, dynamic, fcos, make_queries, model_config

SMALL: dict[str, Any] = {
    "backbone.norm": "gn",
    "detector.strides": [8, 16, 32, 64],
    "detector.level_ranges": [24, 48, 96],
}


def small_model(changes: Mapping[str, Any] | None = None) -> Segmenter:
    torch.manual_seed(0)
    return build_model(model_config(TINY["model"], SMALL, changes or {}), num_classes=5)


def random_images(*size: int) -> Tensor:
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def full_sizes(images: Tensor) -> Tensor:
    return torch.tensor([images.shape[-2:]] * images.shape[0])


def tensors_of(outputs: DenseOutputs) -> dict[str, Tensor]:
    values = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    of_masks = {
        f"mask_inputs.{field.name}": getattr(outputs.mask_inputs, field.name)
        for field in dataclasses.fields(outputs.mask_inputs)
    }
    return {name: value for name, value in (values | of_masks).items() if isinstance(value, Tensor)}


@pytest.fixture(scope="module")
def resnet50() -> Segmenter:
    return build_model(model_config({"backbone.weights": "random"}), num_classes=80)


def test_resnet50_has_the_parameters_of_the_reference(resnet50: Segmenter) -> None:
    counts = {
        trainable: sum(p.numel() for p in resnet50.parameters() if p.requires_grad or not trainable)
        for trainable in (False, True)
    }
    assert counts == {False: 34_259_731, True: 34_037_331}
    # the reference's checkpoint has 372 entries: two of them are constants of its mask head
    assert len(resnet50.state_dict()) == 370
    assert dynamic(resnet50).controller.out_channels == 233
    assert dynamic(resnet50).coordinate_ranges.tolist() == [64, 128, 256, 512, 1024]


def test_resnet50_freezes_stem_and_first_stage_and_every_batch_norm(resnet50: Segmenter) -> None:
    trained = {name for name, parameter in resnet50.backbone.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith(("conv1", "layer1")) for name in trained)
    assert {name.split(".")[0] for name in trained} == {"layer2", "layer3", "layer4"}
    norms = [m for m in resnet50.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenNorm)]
    assert len(norms) == 53
    assert all(isinstance(norm, FrozenNorm) and norm.eps == 1e-5 for norm in norms)


def test_every_class_starts_at_one_percent(resnet50: Segmenter) -> None:
    bias = fcos(resnet50).class_logits.bias
    assert bias is not None
    probability = bias.sigmoid()
    torch.testing.assert_close(probability, torch.full((80,), 0.01))
    for conv in (fcos(resnet50).class_logits, fcos(resnet50).box_tower[0], dynamic(resnet50).controller):
        assert isinstance(conv, nn.Conv2d)
        assert 0.0098 < conv.weight.std() < 0.0102
        assert conv.bias is not None
    assert not resnet50.state_dict()["mask_head.controller.bias"].any()


@pytest.mark.parametrize(
    ("depth", "channels", "stride_in_1x1"), [(18, 512, False), (34, 512, False), (50, 2048, True), (101, 2048, False)]
)
def test_backbones(depth: int, channels: int, stride_in_1x1: bool) -> None:
    narrow = {"mask_head.feature_channels": 8}
    model = build_model(
        model_config({"backbone": {"depth": depth, "weights": "random", "stride_in_1x1": stride_in_1x1}}, narrow),
        num_classes=3,
    )
    with torch.no_grad():
        maps = model.backbone(torch.zeros(1, 3, 64, 32))
    assert [tuple(level.shape[2:]) for level in maps] == [(16, 8), (8, 4), (4, 2), (2, 1)]
    assert maps[-1].shape[1] == channels == model.backbone.channels[-1]
    assert dynamic(model).controller.out_channels == 169
    if channels == 2048:
        assert isinstance(model.backbone, ResNetFeatures)
        first = model.backbone.layer2[0]
        assert (first.conv1.stride, first.conv2.stride) == (((2, 2), (1, 1)) if stride_in_1x1 else ((1, 1), (2, 2)))


def test_structure_is_the_same_in_training_and_evaluation() -> None:
    images = random_images(2, 3, 96, 64)
    model = small_model()
    shapes = []
    for training in (True, False):
        outputs = model.train(training)(images, full_sizes(images))
        shapes.append({name: (tuple(value.shape), value.dtype) for name, value in tensors_of(outputs).items()})
    assert shapes[0] == shapes[1]
    count = 12 * 8 + 6 * 4 + 3 * 2 + 2 * 1  # the level of stride 64 has ceil(96 / 64) x ceil(64 / 64) cells
    assert shapes[0]["class_logits"] == ((2, count, 5), torch.float32)
    assert shapes[0]["mask_inputs.filter_features"][0] == (2, count, 16)
    assert shapes[0]["mask_inputs.mask_features"][0] == (2, 4, 12, 8)
    assert outputs.box_distances.min() >= 0
    assert torch.equal(outputs.locations.xy, model.locations((96, 64), device=images.device).xy)
    assert outputs.locations.xy[-1].tolist() == [32.0, 96.0]


@pytest.mark.parametrize(
    ("changes", "features", "masks", "levels"),
    [
        ({"mask_head.feature_stride": 8, "mask_head.stride": 4}, 8, 4, [8, 16, 32, 64]),
        ({"mask_head.feature_stride": 4, "mask_head.stride": 2}, 4, 2, [8, 16, 32, 64]),
        (
            {
                "mask_head.feature_stride": 4,
                "mask_head.stride": 4,
                "detector.strides": [4, 8, 16],
                "detector.level_ranges": [24, 48],
            },
            4,
            4,
            [4, 8, 16],
        ),
        ({"mask_head.feature_stride": 16, "mask_head.stride": 2}, 16, 2, [8, 16, 32, 64]),
        ({"mask_head.layers": 1, "mask_head.channels": 4}, 8, 4, [8, 16, 32, 64]),
        (
            {"detector.strides": [8, 16, 32, 64, 128], "detector.level_ranges": [24, 48, 96, 192]},
            8,
            4,
            [8, 16, 32, 64, 128],
        ),
    ],
)
def test_every_size_follows_from_the_configuration(
    changes: dict[str, Any], features: int, masks: int, levels: list[int]
) -> None:
    images = random_images(2, 3, 64, 128)
    model = small_model(changes)
    outputs = model(images, full_sizes(images))
    assert outputs.mask_inputs.mask_features.shape[2:] == (64 // features, 128 // features)
    assert outputs.locations.stride.unique().tolist() == levels
    assert dynamic(model).coordinate_ranges.shape == (len(levels),)
    queries = make_queries(torch.tensor([1, 0]), torch.tensor([3, 7]))
    found = model.predict_masks(outputs, queries)
    assert found.logits.shape == (2, 64 // masks, 128 // masks)
    assert found.grid == WholeMap(masks, (64 // masks, 128 // masks))
    loss = found.logits.sum() + sum(value.sum() for value in tensors_of(outputs).values() if value.requires_grad)
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == [], "every parameter takes part"


@pytest.mark.parametrize("side_hw", [(96, 64), (32, 160)])
def test_filters_are_the_controllers_convolution(side_hw: tuple[int, int]) -> None:
    model, images = (
        small_model({"detector.strides": [8, 16, 32, 64], "mask_head.layers": 2}),
        random_images(2, 3, *side_hw),
    )
    outputs = model(images, full_sizes(images))
    sizes = model.level_sizes(side_hw)
    levels = outputs.mask_inputs.filter_features.split([height * width for height, width in sizes], dim=1)
    maps = [level.transpose(1, 2).unflatten(2, size) for level, size in zip(levels, sizes, strict=True)]
    expected = flatten_levels([dynamic(model).controller(level) for level in maps])
    count = expected.shape[1]
    image_index, location_index = torch.arange(2).repeat_interleave(count), torch.arange(count).repeat(2)
    found = dynamic(model).filters(outputs, make_queries(image_index, location_index))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-7)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    parameters = list(fcos(model).box_tower.parameters()) + list(dynamic(model).controller.parameters())
    ours = torch.autograd.grad((found * upstream).sum(), parameters, retain_graph=True)
    theirs = torch.autograd.grad((expected.flatten(0, 1) * upstream).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_coarse_levels_come_from_p5() -> None:
    levels = {"detector.strides": [8, 16, 32, 64, 128], "detector.level_ranges": [24, 48, 96, 192]}
    neck: Any = small_model(levels).neck
    maps = [
        torch.randn(1, channels, side, side) for channels, side in zip((8, 8, 16, 16), (48, 24, 12, 6), strict=True)
    ]
    levels = neck(maps)
    assert {stride: level.shape[-1] for stride, level in levels.items()} == {8: 24, 16: 12, 32: 6, 64: 3, 128: 2}
    first, second = neck.extra
    assert torch.equal(levels[64], first(levels[32]))
    assert torch.equal(levels[128], second(levels[64].relu()))
    # nearest upsampling, lateral and output convolutions, checked at the second level
    lateral, output = [block[0] for block in neck.fpn.inner_blocks], [block[0] for block in neck.fpn.layer_blocks]
    doubled = lateral[2](maps[3]).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(levels[16], output[1](lateral[1](maps[2]) + doubled))


def test_padding_is_zero_after_normalisation() -> None:
    images = random_images(2, 3, 64, 64)
    model = small_model()
    normal = model.normalise(images, torch.tensor([[40, 50], [64, 20]]))
    assert not normal[0, :, 40:].any()
    assert not normal[0, :, :, 50:].any()
    assert not normal[1, :, :, 20:].any()
    config = ModelConfig()
    expected = (images[0, :, 39, 49].double() - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    torch.testing.assert_close(normal[0, :, 39, 49].double(), expected, rtol=1e-5, atol=1e-5)
    padded = images.clone()
    padded[0, :, 40:] = 77  # what stands in the padding of the batch is of no consequence
    assert torch.equal(model.normalise(padded, torch.tensor([[40, 50], [64, 20]])), normal)


def training_masks(model: Segmenter, targets: Targets, images: Tensor) -> tuple[DenseOutputs, Tensor]:
    outputs = model(images, full_sizes(images))
    count = images.shape[0]
    assignment = assign(
        targets,
        sizes_hw=model.level_sizes((64, 64)),
        strides=model.strides,
        num_images=count,
        level_ranges=SMALL["detector.level_ranges"],
        centre_radius=1.5,
    )
    quotas = mask_quotas(
        assignment,
        num_instances=targets.num_instances,
        num_images=count,
        image_index=targets.image_index,
        max_positives=64,
    )
    queries = sample_positives(outputs, assignment, targets, quotas)
    found = model.predict_masks(outputs, queries)
    assert torch.equal(found.instance_index, queries.instance_index)
    return outputs, found.logits


@pytest.mark.parametrize(
    ("boxes", "image_index"), [([[4.0, 4.0, 40.0, 40.0]], [1]), ([], [])], ids=["one image empty", "all images empty"]
)
def test_images_without_boxes_leave_every_parameter_on_the_graph(
    boxes: list[list[float]], image_index: list[int]
) -> None:
    model, images = small_model(), random_images(2, 3, 64, 64)
    outputs, logits = training_masks(model, box_targets(boxes, image_index), images)
    assert logits.shape[1:] == (16, 16)
    assert (logits.shape[0] > 0) == bool(boxes)
    loss = logits.sum() + outputs.class_logits.sum() + outputs.box_distances.sum() + outputs.centreness_logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    gradient = dynamic(model).controller.weight.grad
    assert gradient is not None
    assert bool(gradient.any()) == bool(boxes)


def test_weights_of_before_detector_and_mask_head_were_parts_are_read() -> None:
    """By a model folder, a checkpoint (with its average of the weights) and `init_from`."""
    model = small_model()
    former = {present: old for old, present in FORMER_NAMES.items()}
    weights = {}
    for name, value in model.state_dict().items():
        prefix = next((prefix for prefix in former if name.startswith(prefix)), "")
        weights[former.get(prefix, "") + name.removeprefix(prefix)] = torch.rand_like(value)
    parts = {name.partition(".")[0] for name in weights}
    assert parts == {"backbone", "neck", "head", "controller", "mask_branch"}
    loaded, averaged, started = small_model(), AveragedModel(small_model()).module, small_model()
    loaded.load_state_dict(weights)
    averaged.load_state_dict(weights)
    assert load_initial(started, weights, where="file") == []
    for one in (loaded, averaged, started):
        for (name, value), expected in zip(one.state_dict().items(), weights.values(), strict=True):
            assert torch.equal(value, expected), name


def test_masks_do_not_depend_on_the_other_queries() -> None:
    model, images = small_model(), random_images(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model(images, full_sizes(images))
        image_index, location_index = torch.tensor([1, 0, 1, 0]), torch.tensor([5, 60, 70, 5])
        together = model.predict_masks(outputs, make_queries(image_index, location_index)).logits
        for number in range(4):
            query = make_queries(image_index[number, None], location_index[number, None])
            torch.testing.assert_close(model.predict_masks(outputs, query).logits[0], together[number])


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn"])
def test_frozen_stages_do_not_change_in_training(norm: str) -> None:
    model, images = small_model({"backbone.norm": norm, "backbone.frozen_stages": 2}), random_images(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    outputs = model.train()(images, full_sizes(images))
    (outputs.class_logits.square().sum() + outputs.box_distances.sum()).backward()
    optimizer.step()
    after = model.backbone.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"layer3", "layer4"}


def test_frozen_norm_is_batch_norm_in_evaluation() -> None:
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.2
    frozen = FrozenNorm(6)
    frozen.load_state_dict(norm.state_dict())
    maps = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(frozen(maps), norm.eval()(maps), rtol=1e-5, atol=1e-5)
    assert frozen(maps.bfloat16()).dtype == torch.bfloat16


def test_under_autocast_boxes_and_masks_stay_float32() -> None:
    model, images = small_model().eval(), random_images(1, 3, 64, 64)
    queries = make_queries(torch.tensor([0]), torch.tensor([9]))
    with torch.no_grad():
        exact = model(images, full_sizes(images))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images, full_sizes(images))
            masks = model.predict_masks(outputs, queries).logits
    assert outputs.class_logits.dtype == torch.bfloat16
    assert {outputs.box_distances.dtype, outputs.centreness_logits.dtype, masks.dtype} == {torch.float32}
    torch.testing.assert_close(outputs.class_logits.float(), exact.class_logits, rtol=0.02, atol=0.05)
    torch.testing.assert_close(masks, model.predict_masks(exact, queries).logits, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("training", [False, True])
def test_forward_compiles_as_one_graph(training: bool) -> None:
    model, images = small_model().train(training), random_images(1, 3, 64, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(training):
        expected, found = model(images, full_sizes(images)), compiled(images, full_sizes(images))
    for name, value in tensors_of(expected).items():
        torch.testing.assert_close(tensors_of(found)[name], value)


def test_channels_last_gives_the_same() -> None:
    model, images = small_model().eval(), random_images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(images, full_sizes(images))
        model = model.to(memory_format=torch.channels_last)
        found = model(images.contiguous(memory_format=torch.channels_last), full_sizes(images))
    for name, value in tensors_of(expected).items():
        # Rounding of sums is relative to their largest terms, not to what is left of them.
        assert (tensors_of(found)[name] - value).abs().max() <= 1e-5 * value.abs().max(), name
