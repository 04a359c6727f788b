"""The way of one annotation: sixteen steps from the split file to the printed number, on one tiny data set."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator

from semiseg.config import RunConfig
from semiseg.config.model import FCOSDetector
from semiseg.data.dataset import withhold
from semiseg.data.transforms import Resize
from semiseg.engine import train as training
from semiseg.engine.build import RunData, build_data, build_objective, build_training_loader, train_dataset
from semiseg.engine.evaluate import predict_batch
from semiseg.evaluation.coco_metrics import Metrics, evaluate_detections
from semiseg.losses.detection import detection_counts, mean_detection_losses
from semiseg.losses.terms import MaskTargets, instance_terms, loss_edges, mask_losses, term_counts
from semiseg.models.build import build_model
from semiseg.models.detectors.assign import assign
from semiseg.models.detectors.sample import mask_quotas, sample_positives
from semiseg.models.segmenter import Segmenter
from semiseg.report.aggregate import ReportInput, ReportRow, ReportTable, measurements, summarise
from semiseg.report.tables import csv_table
from semiseg.results import Result, append, read
from semiseg.splits import load_split
from semiseg.structures.inputs import Batch, Supervision
from semiseg.structures.outputs import DenseOutputs
from tests.test_postprocess import postprocess
from tests.tiny import tiny_config

PACKAGE = Path(training.__file__).parent.parent


def test_sixteen_steps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, inference={"score_threshold": 0.001})
    data = build_data(config)
    torch.manual_seed(0)
    model = build_model(config.model, num_classes=len(data.train.class_names))
    batch = from_split_file_to_batch(config, data)
    from_batch_to_loss(config, model, batch)
    from_model_to_printed_number(config, data, model, batch, tmp_path)


def test_a_step_opens_the_functions_that_the_document_names(tmp_path: Path) -> None:
    """In that order, each; which other functions there are to be opened is a reader's judgement."""
    document = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text()
    sentence = document.split("Within a step a reader opens ")[1].split(" An instance with a box alone")[0]
    named = re.findall(r"`([\w.]+)`", sentence)
    assert len(named) == int(sentence.split()[0]) < 20
    config = tiny_config(tmp_path)
    data = build_data(config)
    state = training.prepare(config, data, Accelerator(cpu=True))
    called: dict[str, None] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            called.setdefault(frame.f_code.co_qualname)
            called.setdefault(frame.f_code.co_name)

    loader = iter(build_training_loader(config, data, steps=1, start_step=0, processes=1, rank=0, pin_memory=False))
    sys.setprofile(note)
    try:
        training.optimizer_step(state, [next(loader)], out=tmp_path)
    finally:
        sys.setprofile(None)
    assert [name for name in called if name in named] == named


def from_split_file_to_batch(config: RunConfig, data: RunData) -> Batch:
    # 1 splits/x.toml -> ClassSplit: which classes have masks
    split = load_split("shapes_few_seen", data.train.class_names)
    assert split == data.split
    assert (len(split.seen), len(split.unseen)) == (3, 9)
    # 2 dataset: row + split -> supervision; a withheld mask is gone from here on
    dataset = train_dataset(config, data)
    row = data.train.rows[0]
    instances = withhold(row["objects"], class_names=data.train.class_names, rule=dataset.rule)
    for number, label in enumerate(instances.labels):
        seen = data.train.class_names[label] in split.seen
        assert instances.supervision[number] == (Supervision.MASK if seen else Supervision.BOX)
        assert (number in instances.mask_instance) == seen
    # 3 transforms: geometry chosen from the sample's seed, applied to image, boxes and masks alike
    geometry = Resize(short_sides=[64], long_side=64, flip=0.5)((row["height"], row["width"]), 7)
    # 4 InstanceDataset.batch -> Batch
    keys = [(index, 7) for index in range(4)]
    batch = dataset.batch(keys, size_divisor=config.model.size_divisor).to("cpu")  # contiguous, as in a step
    assert batch.targets is not None
    assert batch.image_sizes_hw[0].tolist() == list(geometry.input_hw)
    assert torch.equal(batch.targets.boxes_xyxy[batch.targets.image_index == 0], geometry.boxes(instances.boxes_xyxy))
    alone = [dataset.batch([key], size_divisor=config.model.size_divisor).targets for key in keys]
    assert batch.targets.num_instances == sum(targets.num_instances for targets in alone if targets is not None)
    assert 0 < len(batch.targets.masks) < batch.targets.num_instances
    return batch


def from_batch_to_loss(config: RunConfig, model: Segmenter, batch: Batch) -> None:
    targets = batch.targets
    assert targets is not None
    # 5 Segmenter.forward -> Outputs, here FCOS's
    outputs = model.train()(batch.images, batch.image_sizes_hw)
    assert isinstance(outputs, DenseOutputs)
    assert isinstance(config.model.detector, FCOSDetector)
    # 6 assign -> Assignment: every box that has a positive has it at a location inside it
    assignment = assign(
        targets,
        sizes_hw=model.level_sizes((64, 64)),
        strides=model.strides,
        num_images=4,
        level_ranges=config.model.detector.level_ranges,
        centre_radius=config.model.detector.centre_radius,
    )
    xy, boxes = outputs.locations.xy[assignment.location_index], targets.boxes_xyxy[assignment.instance_index]
    assert ((xy > boxes[:, :2]) & (xy < boxes[:, 2:])).all()
    # 7 sample -> MaskQueries: the best positives of each box
    quotas = mask_quotas(
        assignment,
        num_instances=targets.num_instances,
        num_images=4,
        image_index=targets.image_index,
        max_positives=config.model.mask_head.max_positives,
    )
    queries = sample_positives(outputs, assignment, targets, quotas)
    assert torch.equal(torch.bincount(queries.instance_index, minlength=targets.num_instances), quotas)
    # 8 predict_masks -> MaskLogits
    mask_logits = model.predict_masks(outputs, queries)
    assert mask_logits.logits.shape == (len(queries.image_index), 16, 16)
    # 9 losses.terms: supervision x objective -> terms
    objective = build_objective(config.objective)
    instances = instance_terms(targets, model.mask_grid(targets.boxes_xyxy, (64, 64)), objective=objective)
    edges = loss_edges(batch, targets, instances, objective=objective)
    prepared = MaskTargets(**vars(instances), objective=objective, masks=targets.masks, edges=edges)
    count = detection_counts(assignment, prepared.box_only)
    count |= zip(objective.count_names, term_counts(targets, prepared, quotas), strict=True)
    detection = mean_detection_losses(outputs, assignment, targets, count, processes=1)
    terms = mask_losses(mask_logits, prepared, count, warmup=1.0, processes=1).with_detection(detection)
    assert {name for name, value in terms.unweighted.items() if value > 0} == {
        *("classification", "box", "centreness", "dice", "projection", "pairwise")
    }
    # 10 the loss: one number, and every trainable weight hears of it
    terms.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def from_model_to_printed_number(
    config: RunConfig, data: RunData, model: Segmenter, batch: Batch, folder: Path
) -> None:
    model.eval()
    # 11 postprocess -> Detections
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes_hw)
    settings = config.inference.model_dump(
        exclude={"short_side", "long_side", "rescore", "refine", "stretch", "area_limits"}
    )
    detections = postprocess(model, outputs, batch.image_sizes_hw, batch.image_sizes_hw, **settings)
    assert detections[0].masks.shape[1:] == (64, 64)
    # 12 evaluate -> COCO results of the same detections
    sizes = data.train.original_sizes_hw()
    with torch.no_grad():
        results = predict_batch(model, batch, sizes, data.train.category_ids, limits=config.inference)
    assert [r["score"] for r in results if r["image_id"] == batch.image_ids[0]] == detections[0].scores.tolist()
    # 13 coco_metrics: here of the ground truth itself, so that the number at the end is known
    perfect = [
        {
            "image_id": row["image_id"],
            "category_id": data.val.category_ids[item["label"]],
            "bbox": [item["box_xyxy"][0], item["box_xyxy"][1], *sides(item["box_xyxy"])],
            "score": 1.0,
            "segmentation": {"size": [64, 64], "counts": item["rle_counts"]},
        }
        for row in data.val.rows
        for item in row["objects"]
    ]
    metrics = evaluate_detections(
        data.val.annotations_file,
        perfect,
        class_names=data.val.class_names,
        image_ids=list(data.val.original_sizes_hw()),
    )
    # 14 results: one appended line per finished run
    append(folder / "results.jsonl", recorded(config, data, metrics))
    stored = read(folder / "results.jsonl")
    # 15 aggregate: seeds and class groups -> one line per row of the table
    assert data.split is not None
    row = ReportRow("projection+pairwise", "yes", "yes", "projection + pairwise")
    table = ReportTable(
        name="table6",
        title="Table 6",
        split="shapes_few_seen",
        split_digest=data.split.digest(),
        seen=data.split.seen,
        unseen=data.split.unseen,
        rows=(row,),
        published=None,
    )
    report = ReportInput(
        study="walk",
        title="walk",
        question="?",
        seeds=(0,),
        tables=(table,),
        results={("table6", row.name, 0): stored[0]},
        data="",
        schedule="",
        pretraining=None,
        run_command="",
        report_command="",
    )
    summary = summarise(measurements(report, table), table)
    # 16 tables: the printed number
    header, line = csv_table(summary).splitlines()
    assert header.startswith("row,projection,pairwise,seeds,all_AP,all_AP50,all_AP75,unseen_AP,")
    assert line.startswith("projection+pairwise,yes,yes,1,100.00,100.00,100.00,100.00,")


def sides(box_xyxy: list[float]) -> tuple[float, float]:
    return box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]


def recorded(config: RunConfig, data: RunData, metrics: Metrics) -> Result:
    return Result(
        run_id="0",
        study="walk",
        row="projection+pairwise",
        split="shapes_few_seen",
        split_digest=data.split_digest,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        identity=config.identity(),
        data_fingerprint=data.fingerprint,
        metrics=metrics.to_dict(),
        steps=4,
        seconds=1.0,
        device="cpu",
        versions={},
        git_revision=None,
        command=[],
        finished="2026-01-01T00:00:00+00:00",
    )
