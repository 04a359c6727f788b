"""The identity of a study's runs: what was done already, where it lies, which recorded results belong to the study.

Equal identities are the same run, which is never trained twice; different ones never share a folder.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from semiseg.config import DataConfig, RunConfig
from semiseg.config.read import digest, file_digest
from semiseg.data.sources import ensure_files
from semiseg.engine.processes import describe_change, fit_to_processes, normalised_together
from semiseg.errors import UserError, UserNotice
from semiseg.files import write_text
from semiseg.project import weights_file
from semiseg.results import Result
from semiseg.splits import load_split
from semiseg.studies.file import RunKey, Study, StudyRun, study_runs

RUNS_FOLDER = Path("runs")
REPORTS_FOLDER = Path("reports")
RESULTS_NAME = "results.jsonl"  # the record of a study


@dataclass(frozen=True, kw_only=True)
class PlannedRun(StudyRun):
    """A run as so many processes execute it: its `init_from` is the initial run's model folder."""

    run_id: str  # digest of `identity`
    identity: dict[str, Any]  # of `run_identity`
    study: str
    init_run: str | None  # run_id of the initial run
    folder: Path  # where it is trained; another study's folder if the same run lies there


def run_identity(
    run: StudyRun,
    *,
    data: Callable[[DataConfig], str],
    split: Callable[[StudyRun], str | None],
    weights: Callable[[str], str],
    processes: int = 1,
) -> dict[str, Any]:
    """What can change the numbers of a `fitted_run`, and nothing else; the digest of this is its run_id.

    `data`, `split` and `weights` give the digests of data, of a run's class split, and of the file that `init_from`
    names; "normalised_together" is there where the cut of a step matters.
    """
    if run.init is not None:
        init: str | None = digest(run_identity(run.init, data=data, split=split, weights=weights, processes=processes))
    else:
        init = None if run.config.init_from is None else weights(run.config.init_from)
    return {
        "config": digest(run.config.identity(initial=init is not None)),
        "split": None if run.split is None else split(run),
        "data": data(run.config.data),
        "init": init,
        **normalised_together(run.config, processes),
    }


def fitted_run(run: StudyRun, processes: int) -> StudyRun:
    """The run and the one that it starts from, as so many processes execute them; a UserError if they cannot."""
    init = None if run.init is None else fitted_run(run.init, processes)
    return replace(run, config=fit_to_processes(run.config, processes), init=init)


def plan(study: Study, *, only: Sequence[str] = (), processes: int = 1) -> list[PlannedRun]:
    """The study's runs with their identities, each run once, initial runs before those that start from them.

    Reads the annotation files, made on first use where the source is none of COCO's layout, and the class splits.
    """
    planned: dict[str, PlannedRun] = {}
    for asked in study_runs(study, only=only):
        run = fitted_run(asked, processes)
        change = describe_change(asked.config, run.config, processes)
        if change:
            warnings.warn(change, UserNotice, stacklevel=2)  # rows with the same change say it once
        identity = run_identity(run, data=data_digest, split=_split_digest, weights=weights_digest, processes=processes)
        run_id, init_run = digest(identity), None
        if run.init is not None:
            init_run = str(identity["init"])
            start = str(planned[init_run].folder / "model")
            run = replace(run, config=run.config.model_copy(update={"init_from": start}))
        own = RUNS_FOLDER / study.name / f"{run.label}-{run_id}"
        # The same run in another study's folder is not trained a second time.
        elsewhere = [] if own.exists() else sorted(RUNS_FOLDER.glob(f"*/*-{run_id}"))
        about: dict[str, Any] = {"identity": identity, "study": study.name, "init_run": init_run}
        folder = elsewhere[0] if elsewhere else own
        planned.setdefault(run_id, PlannedRun(**vars(run), **about, run_id=run_id, folder=folder))
    return list(planned.values())


def write_run_files(run: PlannedRun) -> list[str]:
    """Writes what a run is, into its folder: `identity.json` and `train.json`; the arguments that train it."""
    about = {name: getattr(run, name) for name in ("run_id", "identity", "study", "row", "split", "seed")}
    about["init"] = run.init_run
    write_text(run.folder / "identity.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    write_text(run.folder / "train.json", run.config.model_dump_json(indent=1) + "\n")
    return ["train", str(run.folder / "train.json"), "--out", str(run.folder), "--resume"]


def class_names(config: DataConfig) -> tuple[str, ...]:
    """The classes of a data set: of Shapes its own, else those of the smaller annotation file."""
    if config.format == "shapes":
        from semiseg.data.shapes import SHAPES_CLASSES

        return tuple(SHAPES_CLASSES)
    files = ensure_files(config)
    train, val = (files[name].annotations for name in ("train", "val"))
    return _class_names_of(val, train, (_stamp(val), _stamp(train)))


@lru_cache(maxsize=4)
def _class_names_of(val: Path, train: Path, stamps: object) -> tuple[str, ...]:
    from semiseg.data.coco import read_coco

    own = read_coco(val)
    # What only groups others in the one file may be a class of the other.
    return read_coco(val, classes=read_coco(train).class_names).class_names if own.groupings else own.class_names


def data_digest(config: DataConfig) -> str:
    """Digest of the annotations of training and validation; for Shapes its parameters are in the configuration."""
    if config.format == "shapes":
        from semiseg.data.shapes import GENERATOR_VERSION

        return f"shapes-{GENERATOR_VERSION}"
    files = ensure_files(config)
    paths = [files[name].annotations for name in ("train", "val")]
    return digest([_file_digest(path, _stamp(path)) for path in paths])


def _split_digest(run: StudyRun) -> str:
    return load_split(str(run.split), class_names(run.config.data)).digest()


def weights_digest(init_from: str) -> str:
    """Digest of the file (or of the model folder's weights file) that a run starts from."""
    path = weights_file(Path(init_from))
    if not path.is_file():
        raise UserError(f"{path}: no such file; 'init_from' is {init_from!r}")
    return _file_digest(path, _stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    """Changes with the file's content."""
    return path.stat().st_mtime_ns, path.stat().st_size


@lru_cache(maxsize=16)
def _file_digest(path: Path, stamp: tuple[int, int]) -> str:
    return file_digest(path, 64)


def planned_steps(config: RunConfig) -> int | None:
    """Optimizer steps of a run, None if that needs the data set's size."""
    if config.optim.steps is None and config.data.format != "shapes":
        return None
    return config.optim.num_steps(config.data.shapes.train_images)


def matching_results(study: Study, results: Iterable[Result]) -> dict[RunKey, Result]:
    """The recorded results that belong to the study as it is now written, the newest of each run; needs no data.

    A result of another configuration, split content or initial run is left out, whatever row it is named after. A
    result is the study's if it would be on as many processes as it was trained on.
    """
    results = list(results)
    recorded_data = {result.run_id: result.identity.get("data", "") for result in results}
    matching: dict[RunKey, Result] = {}
    for run in study_runs(study):
        for result in results:
            if result.seed == run.seed and _is_result_of(result, run, recorded_data):
                # The same run may have been recorded under another row's or study's name.
                matching[run.key] = replace(result, study=study.name, row=run.row, split=run.split)
    return matching


def _is_result_of(result: Result, run: StudyRun, recorded_data: Mapping[str, Any]) -> bool:
    """Whether a result is the run's; `recorded_data` has the digest of the data of every recorded run_id."""
    own, classes = _named_data(run.config.data), list(result.metrics["instances"])

    def data(config: DataConfig) -> str:
        is_own = _named_data(config) == own
        return str(result.identity.get("data") if is_own else recorded_data.get(str(result.identity.get("init"))))

    try:
        identity = run_identity(
            fitted_run(run, result.processes),
            data=data,
            split=lambda run: load_split(str(run.split), classes).digest(),
            weights=str,
            processes=result.processes,
        )
    except UserError:
        return False  # a result of another data set, or of processes that the run's batch cannot be shared by
    if (run.init or run).config.init_from is not None:
        # Weights that the study takes from a file are not looked for: the report needs recorded results only.
        identity["init"] = result.identity.get("init")
    return digest(identity) == result.run_id


def _named_data(config: DataConfig) -> str:
    """Digest of what names the annotations, whatever they hold; that of Shapes says nothing of its parameters."""
    names = {"format"}
    if config.format != "shapes":
        names |= {"root", "train_annotations", "val_annotations", "voc", "hub"}
    return digest(config.model_dump(mode="json", include=names))
