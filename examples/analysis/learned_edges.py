"""What colour, learned affinity and the masks say of the edges of some validation images, as one picture.

    python -m examples.analysis.learned_edges runs/shapes_learned/learned-shapes_few_seen-s0-3cfbe68d21e715b9 edges.png

Each cell shows which share of its edges to the cells above and to the left separates instances: by colour those that
are less alike than the threshold, by the branch the mean of its probabilities, by the masks the truth. The run's last
checkpoint must still be there. The quality over all validation images is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from examples.analysis import run_script
from semiseg.config import RunConfig, parse_recorded
from semiseg.config.read import read_json
from semiseg.data.dataset import build_rule
from semiseg.engine.build import RunData, build_data, build_evaluation_loader, build_step
from semiseg.engine.checkpoint import load_tensors
from semiseg.engine.processes import images_in_evaluation
from semiseg.engine.run import measure_edges
from semiseg.engine.session import start_accelerator
from semiseg.engine.step import TrainStep
from semiseg.errors import UserError
from semiseg.losses.learned import AffinityTargets
from semiseg.structures.inputs import Batch


def trained_step(folder: Path) -> tuple[RunConfig, RunData, TrainStep]:
    """A run's configuration and data, and its step as the last checkpoint has it."""
    config = parse_recorded(read_json(folder / "config.json").get("config", {}), where=str(folder / "config.json"))
    checkpoints = sorted((folder / "checkpoints").glob("step_*.pt"))
    if config.objective.affinity != "learned" or not checkpoints:
        raise UserError(f"{folder}: not a run with learned affinity and its checkpoints")
    data = build_data(config)
    module = build_step(config, num_classes=len(data.train.class_names))
    assert module.affinity is not None
    saved = load_tensors(checkpoints[-1])
    try:
        module.model.load_state_dict(saved["model"])
        module.affinity.load_state_dict(saved["affinity"])
    except (KeyError, RuntimeError, TypeError) as error:
        raise UserError(f"{checkpoints[-1]}: no checkpoint of this run ({type(error).__name__})") from None
    return config, data, module.eval()


def edges_of(module: TrainStep, batch: Batch) -> tuple[AffinityTargets, Tensor]:
    """The batch's edges, and the branch's probability of each that it separates (B, K / 2, h, w)."""
    assert module.affinity is not None
    assert batch.targets is not None
    targets = replace(batch.targets, supervision=torch.zeros_like(batch.targets.supervision))
    edges = module.affinity_targets(batch, targets)
    with torch.inference_mode():
        outputs = module.model(batch.images, batch.image_sizes_hw)
        logits = module.affinity(module.model.mask_head.edge_features(outputs), edges.lab, edges.distances)
    return edges, logits.sigmoid()


def draw(images: Tensor, edges: AffinityTargets, learned: Tensor, path: Path) -> None:
    """A row for each image: the photograph and the three answers."""
    figure, axes = plt.subplots(len(images), 4, figsize=(8, 2.1 * len(images)), layout="constrained", squeeze=False)
    answers = {"colour": ~edges.alike, "learned": learned, "masks": edges.different}
    for row, image in zip(range(len(images)), images, strict=True):
        axes[row, 0].imshow(image.permute(1, 2, 0))
        for column, (name, maps) in enumerate(answers.items(), start=1):
            axes[row, column].imshow(maps[row].float().mean(0), vmin=0, vmax=1, cmap="magma")
            axes[0, column].set_title(name, fontsize=9)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("run", type=Path, help="folder of a finished run with learned affinity")
    parser.add_argument("picture", type=Path, help="where to write the picture, .png or .pdf")
    parser.add_argument("--images", type=int, default=3, help="so many of the first validation images")
    arguments = parser.parse_args()
    config, data, module = trained_step(arguments.run)
    most = min(len(data.val.rows), images_in_evaluation(config.runtime))
    if not 1 <= arguments.images <= most:
        raise UserError(f"--images is {arguments.images}, allowed: 1 to {most}")
    quality = measure_edges(config, data, module, start_accelerator(config.runtime, seed=config.seed))
    if quality is None:
        raise UserError(f"{data.val.annotations_file}: has objects without a mask, whose edges are not known")
    print(json.dumps(quality))
    loader = build_evaluation_loader(
        replace(data.val, rows=data.val.rows.select(range(arguments.images))),
        model=config.model,
        inference=config.inference,
        runtime=config.runtime,
        processes=1,
        rank=0,
        rule=build_rule("masks", None),
    )
    batch = next(iter(loader))
    draw(batch.images, *edges_of(module, batch), arguments.picture)


if __name__ == "__main__":
    run_script(main)
