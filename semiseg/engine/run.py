"""One run from its configuration to its recorded numbers: train, predict the validation set, evaluate, write.

What it leaves in its folder: `engine/run_folder.py`.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from semiseg.config import DataConfig, InferenceConfig, ModelConfig, RunConfig, RuntimeConfig, parse_recorded
from semiseg.config.model import RefinerName
from semiseg.config.read import read_json
from semiseg.data.dataset import build_rule
from semiseg.data.problems import describe_empty_classes, describe_missing_masks
from semiseg.data.reading import AS_STORED, Reading
from semiseg.data.sources import AnnotatedImages, cache_folder, ensure_files, reading_of, tables_folder
from semiseg.data.table import Table, load_table
from semiseg.engine.build import RunData, build_data, build_evaluation_loader
from semiseg.engine.checkpoint import load_model_folder, write_json
from semiseg.engine.edges import edge_quality
from semiseg.engine.evaluate import predict_table, refined_results
from semiseg.engine.logs import LOG_NAME, read_log, shows_bars
from semiseg.engine.predict import build_network
from semiseg.engine.processes import describe_change, fit_to_processes
from semiseg.engine.run_folder import adopt_training, check_folder, run_inputs, run_lock
from semiseg.engine.session import accelerate_for_one_run, same_on_all_ranks, start_accelerator
from semiseg.engine.step import TrainStep
from semiseg.engine.train import save_trained, train, trained_model
from semiseg.errors import UserError, UserNotice, differing_names
from semiseg.evaluation.coco_metrics import Metrics, evaluate_detections
from semiseg.evaluation.precision import Backend, require_backend
from semiseg.models.segmenter import Segmenter
from semiseg.results import MAX_DETS, RESULT_NAME
from semiseg.structures.objects import Crowds

Changed = TypeVar("Changed", InferenceConfig, RuntimeConfig)
PACKAGE = Path(__file__).resolve().parents[1]
FROM_PYTHON = "called from Python"  # in the record, where nobody typed a command


@accelerate_for_one_run()
def execute_run(
    config: RunConfig, *, out: Path, resume: bool = True, progress: bool | None = True, command: str = FROM_PYTHON
) -> dict[str, Any]:
    """Trains and evaluates one run in `out`; what is already there is not done again.

    Args:
        resume: continue from the latest checkpoint in `out`; False refuses a folder that has one.
        progress: show progress bars; None = on a terminal, and plain lines elsewhere.
        command: what was typed, for the record.

    The result is what `result.json` holds. A UserError if `out` holds another run, or an unfinished one that is not to
    be continued.
    """
    require_backend(_backend(config.runtime))  # said now rather than after the training
    accelerator = start_accelerator(config.runtime, seed=config.seed)
    config, processes = _fitted(config, accelerator), accelerator.num_processes
    check_folder(config, out, processes=processes, resume=resume)
    # On each machine one process converts; where machines share the folder, the first of all.
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        data = build_data(config)
    _require_objects(data.train)
    if accelerator.is_main_process:
        for table in (data.train, data.val):
            warn_of_images(table, setting="data.value_range = [{low}, {high}]", upright="data.upright = true")
        _warn_of_annotations(data.train, config.data)
        _warn_of_annotations(data.val, config.data, measured=True)
        _warn_of_measures(config.data, learnt=data.train, measured=data.val)
        _warn_of_what_is_not_learnt(config, data)
        if data.pseudo is not None:
            warnings.warn(data.pseudo.summary, UserNotice, stacklevel=2)
    inputs = run_inputs(config, data)
    for name, value in inputs.items():
        same_on_all_ranks(value, where=f"the run's {name!r}", remedy="give each machine the same files")
    claim = run_lock(config, out, inputs=inputs, processes=processes, resume=resume)
    with claim if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            adopt_training(out)
        accelerator.wait_for_everyone()
        if same_on_all_ranks("a result" if (out / RESULT_NAME).exists() else "no result", where=out) == "a result":
            return _stored_result(out / RESULT_NAME)
        return _train_and_evaluate(config, data, accelerator, out=out, progress=progress, command=command)


def _fitted(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The run that these processes execute; what the linear rule changes is said once."""
    processes = accelerator.num_processes
    fitted = fit_to_processes(config, processes)
    change = describe_change(config, fitted, processes)
    if change and accelerator.is_main_process:
        warnings.warn(change, UserNotice, stacklevel=3)
    return fitted


def _require_objects(table: Table) -> None:
    """Refuses to train on a file from which nothing can be learnt."""
    if table.count_objects()[0] == 0:
        crowds = table.crowd_counts.in_words()
        text = f"has no objects to learn from; a crowd region is none{f': {crowds}' if crowds else ''}"
        raise UserError(f"{table.annotations_file}: {text}")


def warn_of_images(
    table: Table, *, setting: str = "--value-range {low} {high}", upright: str = "--upright", looked_at: bool = True
) -> None:
    """Says what of the stored images is not used; the settings that would use it are those of verbs by default."""
    for notice in table.image_notices(setting=setting, upright=upright) if looked_at else ():
        warnings.warn(notice, UserNotice, stacklevel=3)


def _warn_of_annotations(table: Table, data: DataConfig, *, measured: bool = False) -> None:
    """Says before the work what is taken in another way, and, not by a dash in the result, what cannot be measured."""
    for notice in table.notices(crowds_meant=data.format == "voc"):  # its difficult objects
        warnings.warn(notice, UserNotice, stacklevel=3)
    if not measured:
        return
    objects, without = table.count_objects()
    if without:
        warnings.warn(f"{table.annotations_file}: {describe_missing_masks(without, objects)}", UserNotice, stacklevel=3)


def _warn_of_measures(data: DataConfig, *, learnt: Table | None = None, measured: Table) -> None:
    """Says once that boxes, masks and areas look like those of another convention; only evaluations read areas."""
    remarks = [f"{measured.annotations_file}: {remark}" for remark in measured.remarks.values()]
    if learnt is not None and "boxes" in learnt.remarks:
        remarks.insert(0, f"{learnt.annotations_file}: {learnt.remarks['boxes']}")
    if remarks and data.format == "coco":  # what is converted here is not to be mended by the user
        warnings.warn("; ".join(remarks), UserNotice, stacklevel=3)


def _warn_of_what_is_not_learnt(config: RunConfig, data: RunData) -> None:
    """Says which classes have no object, and that fewer have a mask to learn from than the supervision asks for."""
    lacking = data.train.classes_without_objects()
    if lacking and config.data.format != "shapes":  # whose few images lack some by chance
        text = describe_empty_classes(lacking, len(data.train.class_names))
        warnings.warn(f"{data.train.annotations_file}: {text}", UserNotice, stacklevel=3)
    if config.supervision.source not in ("masks", "split"):
        return
    seen = None if data.split is None or config.supervision.source == "masks" else data.split.seen
    labels = [label for label, name in enumerate(data.train.class_names) if seen is None or name in seen]
    objects, without = data.train.count_objects(labels)
    if without:
        of = "" if seen is None else " of seen classes"
        learning = "are left out of the mask losses" if config.objective.box == "none" else "learn from their boxes"
        warnings.warn(
            f"{data.train.annotations_file}: {without} of {objects} objects{of} have no mask; they {learning}",
            UserNotice,
            stacklevel=3,
        )


def _train_and_evaluate(
    config: RunConfig, data: RunData, accelerator: Accelerator, *, out: Path, progress: bool | None, command: str
) -> dict[str, Any]:
    started = time.perf_counter()

    measure = partial(
        evaluate_model,
        table=data.val,
        accelerator=accelerator,
        config=config.model,
        inference=config.inference,
        runtime=config.runtime,
        progress=shows_bars(progress),
    )

    def validate(model: Segmenter) -> dict[str, float] | None:
        metrics = measure(model)
        return None if metrics is None else headline(metrics)

    state = train(
        config,
        data,
        accelerator,
        out=out,
        progress=progress,
        validate=validate if config.runtime.evaluate_every else None,
    )
    save_trained(state, data, out / "model")
    metrics = measure(trained_model(state), detections=out / "detections.json")
    edges = measure_edges(config, data, state.step_module, accelerator)
    if not accelerator.is_main_process or metrics is None:
        return {}
    log = [line for line in read_log(out / LOG_NAME) if "losses" in line]
    train_seconds = log[-1]["seconds"] if log else 0.0
    result = {
        "metrics": metrics.to_dict(),
        "steps": state.step,
        "train_seconds": train_seconds,
        "seconds": max(train_seconds, round(time.perf_counter() - started, 2)),
        **_origin(config, data, accelerator),
        "command": command,
        "edges": edges,
    }
    write_json(out / RESULT_NAME, result)
    return result


def measure_edges(
    config: RunConfig, data: RunData, module: TrainStep, accelerator: Accelerator
) -> dict[str, dict[str, float]] | None:
    """See `edge_quality`; None without the branch, and where validation objects without a mask hide edges."""
    if module.affinity is None or data.val.count_objects()[1]:
        return None
    names, seen = data.val.class_names, data.split.seen if data.split else data.val.class_names
    groups = {"seen": [name in seen for name in names], "unseen": [name not in seen for name in names]}
    loader = build_evaluation_loader(
        data.val,
        model=config.model,
        inference=config.inference,
        runtime=config.runtime,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        rule=build_rule("masks", None),
        bottom_rows_without_affinity=config.data.bottom_rows_without_affinity,
    )
    return edge_quality(module, loader, accelerator, groups=groups)


def _origin(config: RunConfig, data: RunData, accelerator: Accelerator) -> dict[str, Any]:
    """Where the numbers of a run that is finished now come from."""
    return {
        "data_fingerprint": data.fingerprint,
        "val_fingerprint": data.val.object_fingerprint,
        "split_digest": data.split_digest,
        "classes": list(data.train.class_names),
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": package_versions(_backend(config.runtime)),
        "git_revision": git_revision(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def evaluate_model(
    model: Segmenter,
    *,
    table: Table,
    accelerator: Accelerator,
    config: ModelConfig,
    inference: InferenceConfig,
    runtime: RuntimeConfig,
    progress: bool,
    detections: Path | None = None,
    score: float | None = None,
    max_dets: int | None = None,
) -> Metrics | None:
    """Predicts and scores a table; the metrics on the main process, None elsewhere.

    `max_dets` None: nothing that the model keeps goes unmeasured, see `measured_detections`.
    """
    processes, rank = accelerator.num_processes, accelerator.process_index
    loader = build_evaluation_loader(
        table, model=config, inference=inference, runtime=runtime, processes=processes, rank=rank
    )
    results, image_ids = predict_table(model, loader, table, accelerator, limits=inference, progress=progress)
    if not accelerator.is_main_process:
        return None
    how = dict[str, Any](table=table, runtime=runtime, detections=detections, inference=inference, score=score)
    return _measured(results, image_ids, **how, max_dets=max_dets)


def measured_detections(inference: InferenceConfig) -> int:
    """How many detections of an image and class are measured: COCO's 100, or as many as the model keeps of an image."""
    return max(MAX_DETS, inference.max_detections)


def _measured(
    results: list[dict[str, Any]],
    image_ids: list[int],
    *,
    table: Table,
    runtime: RuntimeConfig,
    detections: Path | None,
    inference: InferenceConfig,
    score: float | None = None,
    max_dets: int | None = None,
) -> Metrics:
    """The metrics of results, which are also written to a file where one is named."""
    if detections is not None:
        write_json(detections, results)
    return evaluate_detections(
        table.annotations_file,
        results,
        class_names=table.class_names,
        image_ids=image_ids,
        backend=_backend(runtime),
        fingerprint=table.fingerprint,
        area_limits=(inference.area_limits[0], inference.area_limits[1]),
        score=score,
        max_dets=max_dets or measured_detections(inference),
        crowds=table.crowds,
    )


@accelerate_for_one_run()
def evaluate_run(
    folder: Path | None,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    results: Path | None = None,
    refine: RefinerName | None = None,
    detections: Path | None = None,
    crowds: Crowds | None = None,
    fast: bool = False,
    max_dets: int | None = None,
    progress: bool = True,
    reading: Reading = AS_STORED,
    area_limits: tuple[float, float] | None = None,
    score: float | None = None,
) -> Metrics | None:
    """Evaluates a run's folder on its own validation data, or any model folder on the given annotation file; the
    metrics are on the main process, None elsewhere.

    Args:
        folder: a run's folder (with `config.json` and `model/`) or a model folder; None with `results` alone.
        annotations, images: a COCO json and its image folder; needed for a model folder, both or neither. A json
            without annotations, such as COCO's test sets, is only predicted: the metrics are None.
        results: COCO results to measure in place of the network's; `detections`: where to write them as such.
        refine: see `models/refine.py`; None = as the model was configured, or not at all those of `results`.
        fast: take hotcoco for the numbers, as a run with `runtime.fast_evaluation` does anyway.
        area_limits, max_dets, crowds: see `evaluate_detections`; None = as in the run, and `measured_detections`.
        score: with which detections are counted, too, see `Metrics.at_score`.
        reading: how pixels are meant; what it leaves open as in the run, or by the model's range of values.
    """
    where = folder or Path()
    loaded = None if results else load_model_folder(where / "model" if (where / "model").is_dir() else where)
    files, cache, run = _evaluation_files(folder, annotations, images)
    runtime = _changed(run.runtime, fast_evaluation=fast or None)
    require_backend(_backend(runtime))
    accelerator = start_accelerator(runtime, seed=run.seed)
    reading = reading.or_else(reading_of(run.data)).or_else(Reading(loaded[1].value_range if loaded else None))
    names = loaded[1].class_names if loaded else ()
    read = dict[str, Any](reading=reading, classes=names, crowds=crowds or run.data.crowds)
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        table = load_table(*files, cache=cache, annotations_required=False, **read)
    _require_use(table, detections, where, names or table.class_names)
    inference = _changed((loaded[1] if loaded else run).inference, refine=refine, area_limits=area_limits)
    if accelerator.is_main_process:
        _warn_of_what_is_measured(table, run.data, looked_at=results is None or refine is not None)
    how = dict[str, Any](table=table, runtime=runtime, detections=detections, inference=inference)
    how |= {"score": score, "max_dets": max_dets}
    if results is not None and not accelerator.is_main_process:
        return None
    if results is not None:
        found = refined_results(results, table, refine=refine or "none", progress=progress)
        return _measured(found, list(table.original_sizes_hw()), **how)
    assert loaded is not None
    return evaluate_model(
        build_network(*loaded, where=where).to(accelerator.device),
        accelerator=accelerator,
        config=loaded[1].config,
        progress=progress,
        **how,
    )


def _warn_of_what_is_measured(table: Table, data: DataConfig, *, looked_at: bool) -> None:
    _warn_of_annotations(table, data, measured=True)
    _warn_of_measures(data, measured=table)
    warn_of_images(table, looked_at=looked_at)


def _changed(section: Changed, **values: Any) -> Changed:
    """A section of the configuration with those of the values that are given."""
    return section.model_copy(update={name: value for name, value in values.items() if value is not None})


def _require_use(table: Table, detections: Path | None, where: Path, names: tuple[str, ...]) -> None:
    """A UserError if nothing would come of predicting a table, or the model in `where` has other classes."""
    if not table.annotated and detections is None:
        raise UserError(
            f"{table.annotations_file}: has no annotations, so there is nothing to measure; name a file for the "
            "detections ('--detections out.json')"
        )
    if names != table.class_names:
        differing = differing_names(names, table.class_names)
        raise UserError(f"{where}: its classes differ from those of {table.annotations_file} in {differing}")


def _evaluation_table(
    open_table: Callable[[], Table], data: DataConfig, accelerator: Accelerator, *, predicted: bool
) -> Table:
    """The table, which one process converts; a UserError if there is nothing to measure and nothing predicted."""
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        table = open_table()
    if not table.annotated and not predicted:
        raise UserError(
            f"{table.annotations_file}: has no annotations, so there is nothing to measure; name a file for the "
            "detections ('--detections out.json')"
        )
    if accelerator.is_main_process:
        _warn_of_annotations(table, data, measured=True)
        _warn_of_measures(data, measured=table)
    return table


def _evaluation_files(
    folder: Path | None, annotations: Path | None, images: Path | None
) -> tuple[AnnotatedImages, Path, RunConfig]:
    """The data to measure on, the folder of its Arrow table, and the configuration of a run, or the usual one."""
    if annotations is not None and images is not None:
        return AnnotatedImages(annotations, images), tables_folder(annotations.parent), RunConfig()
    if folder is not None and annotations is None and images is None and (folder / "model").is_dir():
        values = read_json(folder / "config.json")
        config = parse_recorded(values.get("config", {}), where=str(folder / "config.json"))
        files = ensure_files(config.data, sets=("val",))["val"]
        return files, cache_folder(config.data), config
    raise UserError(f"{folder}: give both the annotation file and the image folder to evaluate a model folder on")


def _backend(runtime: RuntimeConfig) -> Backend:
    return "hotcoco" if runtime.fast_evaluation else "pycocotools"


def headline(metrics: Metrics) -> dict[str, float]:
    """What the training log keeps of a validation: AP over all classes in percent; masks only where they are known."""
    values = {"box_AP": metrics.bbox.groups["all"]["AP"]}
    values["mask_AP"] = metrics.segm.groups["all"]["AP"] if metrics.segm else values["box_AP"]
    return {name: value for name, value in values.items() if value is not None}


def _stored_result(path: Path) -> dict[str, Any]:
    try:
        result = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; remove it, and '--resume' evaluates again") from None
    try:
        Metrics.from_dict(result["metrics"])
        int(result["steps"])
    except (UserError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: no result of a run; remove it, and '--resume' evaluates again") from None
    return result


def device_name(device: torch.device) -> str:
    """A name for the record: the GPU's model, or the processor type and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def package_versions(backend: Backend = "pycocotools") -> dict[str, str]:
    """Versions of what computes the numbers; hotcoco's only where it made the metrics."""
    names = ["semiseg", "torch", "torchvision", "accelerate", "datasets", "pycocotools", "numpy"]
    names += [] if backend == "pycocotools" else [backend]
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def git_revision(package: Path = PACKAGE) -> str | None:
    """Revision of the package's own checkout, `-dirty` where files of the package differ; None outside of one.

    Its own is one whose top folder holds the package and that keeps the package's files: a package installed below
    somebody's project lies in that project's checkout, whose revision says nothing about it.
    """
    # git hands these to what it runs, a hook for example; they would name another checkout
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent or not git("ls-files"):
            return None
        revision = git("describe", "--always", "--abbrev=12")
        # The package alone: a study changes its own record in reports/ while it runs.
        return f"{revision}-dirty" if git("status", "--porcelain", "--untracked-files=no", "--", ".") else revision
    except (OSError, subprocess.SubprocessError):
        return None
