"""One run from its configuration to its recorded numbers: train, predict the validation set, evaluate, write.

A run's folder: `config.json` (what run it is: with it, the folder is a run's), `log.jsonl`, `checkpoints/`, `best/`,
`model/`, `detections.json`, `tensorboard/`, and `result.json` (written last: a folder with it is finished).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from semiseg.config import InferenceConfig, ModelConfig, RunConfig, RuntimeConfig, parse_recorded
from semiseg.config.former import FORMER_KEYS, INFERENCE_KEYS, without_unread
from semiseg.config.read import digest, file_digest, read_json
from semiseg.data.problems import describe_missing_masks
from semiseg.data.sources import AnnotatedImages, cache_folder, ensure_files
from semiseg.data.table import Table, load_table, sampled_digest
from semiseg.engine.build import RunData, build_data, build_evaluation_loader
from semiseg.engine.checkpoint import (
    holds_no_more_than_a_model,
    latest_checkpoint,
    load_model_folder,
    named_step,
    write_json,
)
from semiseg.engine.evaluate import predict_table, save_detections, score_table
from semiseg.engine.logs import LOG_NAME, read_log, shows_bars
from semiseg.engine.predict import build_network
from semiseg.engine.processes import (
    fit_to_processes,
    images_in_evaluation,
    normalised_together,
    parts_per_step,
    told_change,
)
from semiseg.engine.session import accelerate_for_one_run, agree, start_accelerator
from semiseg.engine.train import save_trained, train, trained_model
from semiseg.errors import UserError, UserNotice
from semiseg.evaluation.coco_metrics import Metrics
from semiseg.evaluation.precision import Backend, require_backend
from semiseg.files import LOCK_NAME, lock_folder, require_folder, settle, whole_file
from semiseg.models.build import mask_stride
from semiseg.models.segmenter import Segmenter
from semiseg.project import weights_file

PACKAGE = Path(__file__).resolve().parents[1]
RESULT_NAME = "result.json"
RUN_FILES, RUN_FOLDERS, MODELS = (
    {LOG_NAME, "detections.json", RESULT_NAME},
    {"checkpoints", "tensorboard"},
    {"model", "best"},
)
STUDY_FILES = {"identity.json", "train.json", "output.txt"}  # that a study puts into the folder of a run
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

    Returns:
        the contents of `result.json`.

    Raises:
        UserError: if `out` holds another run, or `resume` is False and it holds an unfinished one.
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
        _warn_of_missing_masks(data.val)
        _warn_of_objects_without_masks(config, data)
    inputs = run_inputs(config, data)
    for name, found in inputs.items():
        agree(found, where=f"the run's {name!r}", remedy="give each machine the same files")
    claim = claimed(config, out, inputs=inputs, processes=processes, resume=resume)
    with claim if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            adopt_training(out)
        accelerator.wait_for_everyone()
        if agree("a result" if (out / RESULT_NAME).exists() else "no result", where=out) == "a result":
            return _held_result(out / RESULT_NAME)
        return _train_and_evaluate(config, data, accelerator, out=out, progress=progress, command=command)


def _fitted(config: RunConfig, accelerator: Accelerator) -> RunConfig:
    """The run that these processes execute; what the linear rule changes is said once."""
    processes = accelerator.num_processes
    fitted = fit_to_processes(config, processes)
    parts_per_step(fitted, processes)  # a batch that cannot be shared is said before any work
    told = told_change(config, fitted, processes)
    if told and accelerator.is_main_process:
        warnings.warn(told, UserNotice, stacklevel=3)
    return fitted


def _require_objects(table: Table) -> None:
    """Refuses to train on a file from which nothing can be learnt."""
    if table.count_objects()[0] == 0:
        raise UserError(f"{table.annotations_file}: has no objects to learn from; a crowd region is none")


def _warn_of_missing_masks(table: Table) -> None:
    """Says before the work, not by a dash in its result, that masks cannot be measured."""
    objects, without = table.count_objects()
    if without:
        warnings.warn(f"{table.annotations_file}: {describe_missing_masks(without, objects)}", UserNotice, stacklevel=3)


def _warn_of_objects_without_masks(config: RunConfig, data: RunData) -> None:
    """Says that fewer objects have a mask to learn from than the supervision asks for."""
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

    def measure(model: Segmenter, *, detections: Path | None = None) -> Metrics | None:
        return evaluate_model(
            model,
            data.val,
            accelerator,
            model_config=config.model,
            inference=config.inference,
            batch_size=images_in_evaluation(config.runtime),
            workers=config.runtime.workers,
            detections=detections,
            backend=_backend(config.runtime),
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
    if not accelerator.is_main_process or metrics is None:
        return {}
    result = _result(config, data, accelerator, metrics, steps=state.steps, started=started, out=out)
    result["command"] = command
    write_json(out / RESULT_NAME, result)
    return result


def _result(
    config: RunConfig,
    data: RunData,
    accelerator: Accelerator,
    metrics: Metrics,
    *,
    steps: int,
    started: float,
    out: Path,
) -> dict[str, Any]:
    """The numbers of a finished run and where they come from."""
    log = [line for line in read_log(out / LOG_NAME) if "losses" in line]
    train_seconds = log[-1]["seconds"] if log else 0.0
    return {
        "metrics": metrics.to_dict(),
        "steps": steps,
        "train_seconds": train_seconds,
        "seconds": max(train_seconds, round(time.perf_counter() - started, 2)),
        "data_fingerprint": data.fingerprint,
        "val_fingerprint": data.val.fingerprint,
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
    table: Table,
    accelerator: Accelerator,
    *,
    model_config: ModelConfig,
    inference: InferenceConfig,
    batch_size: int,
    workers: int,
    detections: Path | None,
    backend: Backend,
    progress: bool,
) -> Metrics | None:
    """Predicts and scores a table; the metrics on the main process, None elsewhere."""
    loader = build_evaluation_loader(
        table,
        short_side=inference.short_side,
        long_side=inference.long_side,
        mask_stride=mask_stride(model_config),
        size_divisor=model_config.size_divisor,
        batch_size=batch_size,
        workers=workers,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    results, image_ids = predict_table(model, loader, table, accelerator, limits=inference, progress=progress)
    if not accelerator.is_main_process:
        return None
    if detections is not None:
        save_detections(detections, results)
    return score_table(results, table, image_ids=image_ids, backend=backend)


@accelerate_for_one_run()
def evaluate_run(
    folder: Path,
    *,
    annotations: Path | None = None,
    images: Path | None = None,
    detections: Path | None = None,
    fast: bool = False,
    progress: bool = True,
) -> Metrics | None:
    """Evaluates a run's folder on its own validation data, or any model folder on the given annotation file.

    Args:
        folder: a run's folder (with `config.json` and `model/`) or a model folder.
        annotations, images: a COCO json and its image folder; needed for a model folder, both or neither. A json
            without annotations, such as COCO's test sets, is only predicted: the metrics are None.
        detections: where to write the detections as COCO results.
        fast: take hotcoco for the numbers, as a run with `runtime.fast_evaluation` does anyway.

    Returns:
        the metrics on the main process, None elsewhere.
    """
    weights, info = load_model_folder(folder / "model" if (folder / "model").is_dir() else folder)
    if annotations is not None and images is not None:
        runtime, seed = RuntimeConfig(), 0
        files, cache = AnnotatedImages(annotations, images), annotations.parent / "arrow"
    elif annotations is None and images is None and (folder / "model").is_dir():
        values = read_json(folder / "config.json")
        config = parse_recorded(values.get("config", {}), where=str(folder / "config.json"))
        runtime, seed = config.runtime, config.seed
        files, cache = ensure_files(config.data, sets=("val",))["val"], cache_folder(config.data)
    else:
        raise UserError(f"{folder}: give both the annotation file and the image folder to evaluate a model folder on")
    backend: Backend = "hotcoco" if fast else _backend(runtime)
    require_backend(backend)
    accelerator = start_accelerator(runtime, seed=seed)
    with accelerator.main_process_first(), accelerator.local_main_process_first():
        table = load_table(files.annotations, files.images, cache=cache, annotations_required=False)
    if not table.annotated and detections is None:
        raise UserError(
            f"{table.annotations_file}: has no annotations, so there is nothing to measure; name a file for the "
            "detections ('--detections out.json')"
        )
    if info.class_names != table.class_names:
        differing = ", ".join(sorted(set(info.class_names) ^ set(table.class_names))) or "their order"
        raise UserError(f"{folder}: its classes differ from those of {table.annotations_file} in {differing}")
    if accelerator.is_main_process:
        _warn_of_missing_masks(table)
    return evaluate_model(
        build_network(weights, info, where=folder).to(accelerator.device),
        table,
        accelerator,
        model_config=info.config,
        inference=info.inference,
        batch_size=images_in_evaluation(runtime),
        workers=runtime.workers,
        detections=detections,
        backend=backend,
        progress=progress,
    )


def _backend(runtime: RuntimeConfig) -> Backend:
    return "hotcoco" if runtime.fast_evaluation else "pycocotools"


def headline(metrics: Metrics) -> dict[str, float]:
    """What the training log keeps of a validation: AP over all classes in percent; masks only where they are known."""
    values = {"box_AP": metrics.bbox.groups["all"]["AP"]}
    values["mask_AP"] = metrics.segm.groups["all"]["AP"] if metrics.segm else values["box_AP"]
    return {name: value for name, value in values.items() if value is not None}


def _identity(config: RunConfig, processes: int) -> dict[str, Any]:
    """What can change the numbers of the run that so many processes execute, but for `run_inputs`."""
    return {**config.identity(initial=config.init_from is not None), **normalised_together(config, processes)}


def run_inputs(config: RunConfig, data: RunData) -> dict[str, str | None]:
    """Digests of what the configuration only names, the other part of a run's identity."""
    return {
        "data": data.fingerprint,
        "split": data.split_digest if config.supervision.source == "split" else None,
        "image_files": digest([sampled_digest(data.train), sampled_digest(data.val)]),
        "init_from": file_digest(weights_file(Path(config.init_from))) if config.init_from is not None else None,
    }


def check_folder(
    config: RunConfig, out: Path, *, inputs: dict[str, str | None] | None = None, processes: int = 1, resume: bool
) -> None:
    """Looks whether a run may be trained in a folder: a new or empty one, or one of this run.

    A run of which neither weights nor a result are left has not begun, and another one may take its place.

    Args:
        inputs: of `run_inputs`; None before the data is read.
        processes: that will train it.

    Raises:
        UserError: no folder, or it holds another run or what no run wrote, or this run without `resume`.
    """
    require_folder(out)
    path, identity = out / "config.json", _identity(config, processes)
    saved = latest_checkpoint(out / "checkpoints") is not None
    stored: dict[str, Any] = {}
    with suppress(UserError):
        stored = read_json(path)
    is_run = isinstance(stored.get("identity"), dict)
    if saved and path.exists() and not is_run:
        raise UserError(f"{path}: says not which run {out} holds; another --out starts afresh")
    _require_nothing_else(out, is_run=is_run)
    if not saved and not any((out / name).exists() for name in (RESULT_NAME, *MODELS)):
        _require_planned(out, identity, processes)
        return
    wanted = {"identity": identity, **({} if inputs is None else {"inputs": dict(inputs)})}
    held: dict[str, Any] = {name: stored.get(name) for name in wanted}
    if isinstance(held.get("inputs"), dict) and "image_files" not in held["inputs"]:  # from before it was kept
        wanted["inputs"].pop("image_files", None)
    with suppress(KeyError, TypeError, AttributeError):  # damaged: it differs in any case
        # A version of before kept what nothing reads.
        without_unread(stored["identity"], initial=stored["inputs"]["init_from"] is not None)
    if digest(held) != digest(wanted):
        raise UserError(f"{out}: holds another run ({_first_difference(held, wanted)})")
    if not resume:
        raise UserError(f"{out}: holds this run already; '--resume' continues it, another --out starts afresh")


def _require_nothing_else(out: Path, *, is_run: bool) -> None:
    """Refuses a folder with things that no run wrote: a run's files would replace them or be mixed up with them.

    Hidden files are nobody's concern: no run replaces or removes one that it has not written itself. What else a user
    has put beside the files of a run stays, too, if it has another name than these.

    Args:
        is_run: the folder's `config.json` is that of a run.
    """
    if not out.is_dir():
        return
    strange = []
    for path in sorted(out.iterdir()):
        if is_run:
            wrong = path.name in (RUN_FILES if path.is_dir() else RUN_FOLDERS)
            wrong = wrong or (path.name in MODELS and not holds_no_more_than_a_model(path))
        else:
            wrong = path.name not in STUDY_FILES and not path.name.startswith(".")
        strange += [f"{path.name}/" if path.is_dir() else path.name] if wrong else []
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        told = f"{', '.join(strange[:3])}{more}"
        raise UserError(f"{out}: holds what no run wrote: {told}; give a new or an empty folder as --out")


def _require_planned(out: Path, identity: dict[str, Any], processes: int) -> None:
    """A study says in `identity.json` which run its folder is for; on other processes it may be another one."""
    path = out / "identity.json"
    planned = read_json(path).get("identity") if path.is_file() else None
    if not isinstance(planned, dict):
        return
    config = digest({key: value for key, value in identity.items() if key != "normalised_together"})
    cuts = [item.get("normalised_together") for item in (planned, identity)]
    if planned.get("config") != config or cuts[0] != cuts[1]:
        raise UserError(
            f"{path}: means another run than this configuration is on {processes} processes (there batch norm is over "
            f"{_images(cuts[0])}, here over {_images(cuts[1])}); take as many as the study, or another --out"
        )


def _images(cut: dict[str, int] | None) -> str:
    """`normalised_together` in words."""
    return " and ".join(f"{number} images ({norm})" for norm, number in cut.items()) if cut else "the whole batch"


def _held_result(path: Path) -> dict[str, Any]:
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


@contextmanager
def claimed(
    config: RunConfig, out: Path, *, inputs: dict[str, str | None], processes: int = 1, resume: bool
) -> Iterator[None]:
    """Keeps other processes from training in the folder and writes the run's configuration into it.

    If the run fails before it has made anything else, these are removed again, and with them a new folder.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out):
        settle(out)
        settle(out / "checkpoints")
        check_folder(config, out, inputs=inputs, processes=processes, resume=resume)
        identity, values = _identity(config, processes), config.model_dump(mode="json")
        write_json(out / "config.json", {"identity": identity, "inputs": inputs, "config": values})
        try:
            yield
        except BaseException:
            if {path.name for path in out.iterdir()} <= {"config.json", LOCK_NAME}:
                (out / "config.json").unlink(missing_ok=True)
                (out / LOCK_NAME).unlink(missing_ok=True)
                if new:
                    with suppress(OSError):  # another process has just begun there
                        out.rmdir()
            raise


def adopt_training(out: Path) -> None:
    """Gives a study's run that has not begun the end of a training that differs from it in evaluation alone, if any.

    So another threshold is another evaluation and no other training. Looks at the folders of runs beside `out` and in
    those of other studies.
    """
    if not (out / "identity.json").is_file() or latest_checkpoint(out / "checkpoints") is not None:
        return
    mine = read_json(out / "config.json")
    for folder in sorted(path.parent for path in out.parent.parent.glob("*/*/config.json")):
        saved = _trained_alike(folder, mine)
        if saved is None:
            continue
        for part in (folder / LOG_NAME, saved):  # the checkpoint last: with it the training counts as done
            with whole_file(out / part.relative_to(folder)) as new, part.open("rb") as old:
                shutil.copyfileobj(old, new)
        told = f"{out}: trained already as {folder}, which differs in evaluation alone"
        warnings.warn(told, UserNotice, stacklevel=3)
        return


def _trained_alike(folder: Path, mine: dict[str, Any]) -> Path | None:
    """The last checkpoint of a finished run of which `mine`, a run's `config.json`, differs in evaluation alone.

    Validations during a training depend on the evaluation, too: with these it is another training.
    """
    with suppress(UserError, KeyError, TypeError, AttributeError):  # no run's folder, or a damaged one
        held, saved = read_json(folder / "config.json"), latest_checkpoint(folder / "checkpoints")
        same = held["inputs"] == mine["inputs"] and _trained(held["identity"]) == _trained(mine["identity"])
        validated = any(values["config"]["runtime"]["evaluate_every"] for values in (held, mine))
        if same and not validated and saved is not None:
            return saved if named_step(saved) == read_json(folder / RESULT_NAME)["steps"] else None
    return None


def _trained(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what only evaluation reads."""
    return {
        **identity,
        **{
            name: {key: value for key, value in identity[name].items() if f"{name}.{key}" not in INFERENCE_KEYS}
            for name in ("data", "model")
        },
    }


def _first_difference(held: Any, wanted: Any, path: str = "") -> str:
    if path == "identity.normalised_together":
        return (
            f"its batch norm is over {_images(held)}, wanted {_images(wanted)}: that follows from the number of "
            "processes and from runtime.images_per_process"
        )
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(set(held) | set(wanted)):
            if held.get(key) != wanted.get(key):
                return _first_difference(held.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
    path = path.removeprefix("identity.")
    return f"its {FORMER_KEYS.get(path, path)} is {held!r}, wanted {wanted!r}"


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

    def told(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=environment)
        return done.stdout.strip()

    try:
        if Path(told("rev-parse", "--show-toplevel")).resolve() != package.resolve().parent or not told("ls-files"):
            return None
        revision = told("describe", "--always", "--abbrev=12")
        # The package alone: a study changes its own record in reports/ while it runs.
        return f"{revision}-dirty" if told("status", "--porcelain", "--untracked-files=no", "--", ".") else revision
    except (OSError, subprocess.SubprocessError):
        return None
