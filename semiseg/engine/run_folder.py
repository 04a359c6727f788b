"""A run's folder: which run it holds, whether another may be trained there, and training that is there already.

Its files: `config.json` (what run it is: with it, the folder is a run's), `log.jsonl`, `checkpoints/`, `best/`,
`model/`, `detections.json`, `tensorboard/`, and `result.json` (written last: a folder with it is finished).
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from semiseg.config import RunConfig
from semiseg.config.former import FORMER_KEYS, INFERENCE_KEYS, without_unread
from semiseg.config.read import digest, file_digest, read_json
from semiseg.data.table import sampled_digest
from semiseg.engine.build import RunData
from semiseg.engine.checkpoint import holds_no_more_than_a_model, latest_checkpoint, named_step, write_json
from semiseg.engine.logs import LOG_NAME
from semiseg.engine.processes import normalised_together
from semiseg.errors import UserError, UserNotice
from semiseg.files import (
    LOCK_NAME,
    lock_folder,
    refuse_others,
    require_folder,
    require_nothing_else,
    settle,
    whole_file,
)
from semiseg.project import weights_file
from semiseg.results import RESULT_NAME

RUN_FILES, RUN_FOLDERS, MODELS = (
    {LOG_NAME, "detections.json", RESULT_NAME},
    {"checkpoints", "tensorboard"},
    {"model", "best"},
)
STUDY_FILES = {"identity.json", "train.json", "output.txt"}  # that a study puts into the folder of a run


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

    Else a UserError. A run of which neither weights nor a result are left has not begun, and another one may take its
    place. Without `inputs` (of `run_inputs`), before the data is read, only the configurations are compared.
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
    recorded: dict[str, Any] = {name: stored.get(name) for name in wanted}
    if isinstance(recorded.get("inputs"), dict) and "image_files" not in recorded["inputs"]:  # from before it was kept
        wanted["inputs"].pop("image_files", None)
    with suppress(KeyError, TypeError, AttributeError):  # damaged: it differs in any case
        # A version of before kept what nothing reads.
        without_unread(stored["identity"], initial=stored["inputs"]["init_from"] is not None)
    if digest(recorded) != digest(wanted):
        raise UserError(f"{out}: holds another run ({_first_difference(recorded, wanted)})")
    if not resume:
        raise UserError(f"{out}: holds this run already; '--resume' continues it, another --out starts afresh")


def _require_nothing_else(out: Path, *, is_run: bool) -> None:
    """Refuses a folder with things that no run wrote: a run's files would replace them or be mixed up with them.

    What a user has put beside the files of a run stays if it has another name than these.
    """
    if not is_run:
        require_nothing_else(out, writer="run", known=STUDY_FILES)
        return
    strange = []
    for path in sorted(out.iterdir()):
        wrong = path.name in (RUN_FILES if path.is_dir() else RUN_FOLDERS)
        if wrong or (path.name in MODELS and not holds_no_more_than_a_model(path)):
            strange.append(path)
    refuse_others(out, strange, writer="run")


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


@contextmanager
def run_lock(
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
        message = f"{out}: trained already as {folder}, which differs in evaluation alone"
        warnings.warn(message, UserNotice, stacklevel=3)
        return


def _trained_alike(folder: Path, mine: dict[str, Any]) -> Path | None:
    """The last checkpoint of a finished run of which `mine`, a run's `config.json`, differs in evaluation alone.

    Validations during a training depend on the evaluation, too: with these it is another training.
    """
    with suppress(UserError, KeyError, TypeError, AttributeError):  # no run's folder, or a damaged one
        recorded, saved = read_json(folder / "config.json"), latest_checkpoint(folder / "checkpoints")
        same = recorded["inputs"] == mine["inputs"] and _trained(recorded["identity"]) == _trained(mine["identity"])
        validated = any(values["config"]["runtime"]["evaluate_every"] for values in (recorded, mine))
        if same and not validated and saved is not None:
            return saved if named_step(saved) == read_json(folder / RESULT_NAME)["steps"] else None
    return None


def _trained(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without what only evaluation reads: the section `inference`, and what of it was in others before."""
    trained = {
        name: {key: value for key, value in identity[name].items() if f"{name}.{key}" not in INFERENCE_KEYS}
        for name in ("data", "model")
    }
    return {name: value for name, value in (identity | trained).items() if name != "inference"}


def _first_difference(recorded: Any, wanted: Any, path: str = "") -> str:
    if path == "identity.normalised_together":
        return (
            f"its batch norm is over {_images(recorded)}, wanted {_images(wanted)}: that follows from the number of "
            "processes and from runtime.images_per_process"
        )
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in sorted(set(recorded) | set(wanted)):
            if recorded.get(key) != wanted.get(key):
                return _first_difference(recorded.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
    path = path.removeprefix("identity.")
    return f"its {FORMER_KEYS.get(path, path)} is {recorded!r}, wanted {wanted!r}"
