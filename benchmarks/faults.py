"""Attacks an installed semiseg and counts what it survives: kills, things that run out, broken inputs, mutations.

    python -m benchmarks.faults --write docs/RELIABILITY.md         # about an hour
    python -m benchmarks.faults --quick                             # some minutes: at most five cases of each kind
    python -m benchmarks.faults --repeat kills.train:0:17           # one case again; its folder is kept

Every case is drawn from (category, seed, number). Commands are those of the command line, run through
`semiseg.__main__.main` in processes forked from one that has imported everything, so that a kill hits work rather than
imports. Linux only: forks, /proc, namespaces. GPUs are not used.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import hashlib
import importlib
import json
import mmap
import multiprocessing
import os
import pkgutil
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # for `python benchmarks/faults.py`; an installed semiseg comes first
# The same sums in every process, and no threads in the one that forks.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONUNBUFFERED="1")

import psutil  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks import fault_inputs as inputs  # noqa: E402

FORK = multiprocessing.get_context("fork")
PATIENCE = 20.0  # seconds that processes have to end by themselves
MUTATIONS_PER_CASE = 250
BEGIN, END = "<!-- faults:begin -->", "<!-- faults:end -->"


# Commands ------------------------------------------------------------------------------------------------------------


class Job(NamedTuple):
    """A command line that is attacked.

    Attributes:
        base: the project that it starts from; see `Workshop.prepared`.
        kills: how it is killed, in turn: before a call that changes files, after a time, or a child of it.
        loose: files that tell of times or of how often the command was started: only their names are compared.
    """

    line: str
    base: str = "plain"
    kills: tuple[str, ...] = ("event", "time")
    loose: str = r"\.pt$|output\.txt$|\.lock$"


TRAIN = f"train run.toml --out {inputs.RUN} --resume"
EVALUATE = "evaluate model --annotations coco/instances.json --images coco/images --detections d.json --out n.json"
STUDY_PROGRESS = r"of \d+ runs done|done in \d+ s"
STUDY_LOOSE = r"\.pt$|output\.txt$|\.lock$|\.html$|report\.md$|figures/"
JOBS = {
    "train": Job(TRAIN),
    "train-workers": Job(f"{TRAIN} --set runtime.workers=1", kills=("event", "time", "child")),
    "study": Job("run study --jobs 2", kills=("event", "time", "child"), loose=STUDY_LOOSE),
    "arrow": Job(EVALUATE),
    "evaluate": Job(EVALUATE, base="converted"),
    "predict": Job("predict model coco/images --out predictions"),
    "report": Job("report study --out shown", base="studied"),
    "shapes": Job("data shapes drawn --images 6 --size 64"),
    "resume": Job(TRAIN, base="interrupted"),
    "photo": Job("predict model photo.png --out predictions"),
    "status": Job("status shapes --out page"),
    "dry-run": Job("run study --dry-run"),
    "split": Job("split show few coco/instances.json"),
}


class Kill(NamedTuple):
    """A command is killed before its call number `event` that changes files, or (or its child) after `seconds`."""

    how: str
    event: int
    seconds: float

    def __str__(self) -> str:
        moment = f"call {self.event}" if self.how == "event" else f"{self.seconds:.2f} s"
        return f"{'child ' if self.how == 'child' else ''}killed at {moment}"


class Done(NamedTuple):
    """How a command has ended; `code` is None if it had to be ended. `events`: calls that changed files."""

    code: int | None
    killed: bool
    out: str
    err: str
    seconds: float
    events: int

    @property
    def told(self) -> str:
        """Its end in a line."""
        end = f"exit code {self.code}" if self.code is not None else f"no end after {self.seconds:.0f} s"
        return f"{end}, {(self.err.strip().splitlines() or ['no word'])[-1][:200]}"

    def refusal(self, codes: Sequence[int] = (2,)) -> str | None:
        """What is wrong with this end as that of a command that refuses; None: a sentence and an exit code."""
        if "Traceback (most recent call last)" in self.err:
            return f"traceback: {self.told}"
        lines = [line for line in self.err.splitlines() if line.startswith("semiseg: ")]
        sentences = sum(not re.search(STUDY_PROGRESS, line) for line in lines)
        return None if self.code in codes and 0 < sentences < 4 else f"not refused by a sentence: {self.told}"


def command(
    line: str, folder: Path, *, timeout: float, kill: Kill | None = None, limits: Mapping[int, int] | None = None
) -> Done:
    """Runs a command line of semiseg in a folder, with limits of its own; what it prints lies beside the folder."""
    events = mmap.mmap(-1, 8)
    fatal = kill.event if kill is not None and kill.how == "event" else 0
    process = FORK.Process(target=_become, args=(line, folder, limits or {}, events, fatal))
    began = time.monotonic()
    process.start()
    struck = False
    if kill is not None and kill.how != "event":
        process.join(kill.seconds)
        if process.is_alive():
            itself = psutil.Process(process.pid)
            victims = [itself] if kill.how == "time" else itself.children(recursive=True)[:1]
            struck = bool(victims)
            end(victims)
    process.join(timeout)
    seconds, code = time.monotonic() - began, process.exitcode
    if code is None:
        end(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.join()
    files = [Path(f"{folder}.{name}") for name in ("out", "err")]  # not there if it was killed before it opened them
    out, err = (path.read_text(errors="replace") if path.exists() else "" for path in files)
    killed = code is not None and (struck or code == -signal.SIGKILL)
    return Done(code, killed, out, err, seconds, int.from_bytes(events[:], "little"))


def _become(line: str, folder: Path, limits: Mapping[int, int], events: mmap.mmap, fatal: int) -> None:
    """Turns this process into the command."""
    os.setsid()
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    for what, limit in limits.items():
        resource.setrlimit(what, (limit, limit))
    sys.addaudithook(partial(_count, str(folder), os.getpid(), events, fatal))
    sys.argv = ["semiseg", *shlex.split(line)]
    try:
        importlib.import_module("semiseg.__main__").main()
    finally:
        atexit._run_exitfuncs()  # which a fork leaves out, and a command does not


def _count(folder: str, process: int, events: mmap.mmap, fatal: int, event: str, details: tuple[Any, ...]) -> None:
    """Counts calls that change the project's files, and kills the process before the fatal one."""
    changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "os.chmod")
    if not changes and not (event == "open" and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        return
    path = details[0]
    if os.getpid() != process or not isinstance(path, str | bytes | os.PathLike):
        return
    if os.path.abspath(os.fsdecode(path)).startswith(folder):
        number = int.from_bytes(events[:], "little") + 1
        events[:] = number.to_bytes(8, "little")
        if number == fatal:
            os.kill(process, signal.SIGKILL)


def end(processes: Sequence[psutil.Process]) -> None:
    """Ends processes, of which some may have ended already."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def leftovers(patience: float) -> list[str]:
    """Waits for the processes that commands of this case have left; those that do not end are ended and named."""
    _, alive = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=patience)
    names = [" ".join(process.cmdline())[:80] for process in alive]
    end(alive)
    return names


# Folders -------------------------------------------------------------------------------------------------------------

TIMES = {"seconds", "train_seconds", "data_seconds", "images_per_second", "finished", "command"}


def tree(folder: Path, loose: str) -> dict[str, str]:
    """Every file and folder -> digest of its content; of JSON without times, of `loose` files without content."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*"))}
    return {
        name: hashlib.sha256(_timeless(path)).hexdigest() if path.is_file() and not re.search(loose, name) else ""
        for name, path in paths.items()
    }


def _timeless(path: Path) -> bytes:
    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in TIMES}

    content = path.read_bytes()
    if path.suffix not in (".json", ".jsonl"):
        return content
    try:
        parts = [content] if path.suffix == ".json" else content.split(b"\n")
        lines = [json.dumps(json.loads(part, object_pairs_hook=keep)) for part in parts if part]
    except (ValueError, RecursionError):
        return content
    return "\n".join(sorted(lines) if path.name == "results.jsonl" else lines).encode()  # runs end in any order


def difference(wanted: dict[str, str], found: dict[str, str]) -> str:
    """In words; "" if there is none."""
    told = {
        "missing": sorted(set(wanted) - set(found)),
        "left over": sorted(set(found) - set(wanted)),
        "different": sorted(name for name in set(wanted) & set(found) if wanted[name] != found[name]),
    }
    return "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in told.items() if names)


class Reference(NamedTuple):
    """An undisturbed run of a job: what it leaves, how long it takes, how often it changes files, what it says."""

    tree: dict[str, str]
    seconds: float
    events: int
    out: str

    @property
    def timeout(self) -> float:
        """Seconds after which a command hangs, on a machine that may have become busy meanwhile."""
        return 60 + 10 * self.seconds


class Workshop:
    """A folder of prepared projects and undisturbed runs, and of a project for each case; for all processes."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.keep = folder, seed, False
        self.progress = mmap.mmap(-1, 8)  # of a case's mutations, for whoever finds it dead

    def prepared(self, base: str) -> Path:
        """The project `plain`, `converted` (with its Arrow table), `studied` (its study done) or `interrupted`."""
        folder = self.folder / base
        if folder.exists():
            return folder
        if base == "plain":
            folder.mkdir()
            in_a_fork(partial(inputs.build_project, folder))
            return folder
        job = {"converted": "arrow", "studied": "study", "interrupted": "train"}[base]
        reference = self.reference(job)
        self.project(JOBS[job].base, folder)
        kill = Kill("event", int(0.65 * reference.events), 0) if base == "interrupted" else None
        command(JOBS[job].line, folder, timeout=600, kill=kill)
        for name in ("d.json", "n.json"):
            (folder / name).unlink(missing_ok=True)
        return folder

    def project(self, base: str, place: Path | None = None) -> Path:
        """A copy of a prepared project, by default in a new folder."""
        return shutil.copytree(self.prepared(base), place or self.empty(), dirs_exist_ok=True)

    def empty(self) -> Path:
        """A new folder in a new folder."""
        place = Path(tempfile.mkdtemp(dir=self.folder, prefix="case-")) / "project"
        place.mkdir()
        return place

    def reference(self, job: str) -> Reference:
        """The undisturbed run of a job, done on first use by whichever process."""
        known = self.folder / f"{job}.json"
        if not known.exists():
            folder = self.project(JOBS[job].base)
            done = command(JOBS[job].line, folder, timeout=600)
            if done.code != 0:
                raise RuntimeError(f"the undisturbed {job!r} failed: {done.told}")
            left = tree(folder, JOBS[job].loose)
            known.write_text(json.dumps(Reference(left, done.seconds, done.events, done.out)))
        return Reference(*json.loads(known.read_text()))


def in_a_fork(work: Callable[[], Any]) -> Any:
    """The result of a function, computed in a process that adopts the orphans of its commands.

    Raises:
        ChildProcessError: it died, or took longer than half an hour.
    """
    ours, theirs = FORK.Pipe(duplex=False)

    def run() -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        theirs.send(work())

    process = FORK.Process(target=run)
    process.start()
    theirs.close()
    try:
        if not ours.poll(1800):
            raise ChildProcessError("no end")
        return ours.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"died with exit code {process.exitcode}") from None
    finally:
        if process.is_alive():
            end(psutil.Process(process.pid).children(recursive=True))
        process.kill()
        process.join()


# Attacks -------------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a case has found: number of the attack within the category, and what was wrong with its outcome."""

    tried: int = 1
    kills: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    skipped: str = ""

    @property
    def failed(self) -> int:
        """Attacks with a failure, of which each may have several."""
        return len({number for number, _ in self.failures})

    @property
    def survived(self) -> int:
        """The others."""
        return self.tried - self.failed


Attack = Callable[[Workshop, int, random.Random], Verdict]


def killed(name: str, shop: Workshop, number: int, draw: random.Random) -> Verdict:
    """Kills a command once or twice, runs it to its end and compares what it leaves with an undisturbed run."""
    job, wanted, verdict = JOBS[name], shop.reference(name), Verdict()
    folder = shop.project(job.base)
    run, told, wrong = partial(command, job.line, folder, timeout=wanted.timeout), "", []
    for again in range(1 if draw.random() < 0.7 else 2):
        place = draw.random() if again else (number * 0.618034 + shop.seed * 0.414214) % 1  # spread evenly
        kill = Kill(job.kills[number % len(job.kills)], 1 + int(place * wanted.events), place * wanted.seconds)
        done = run(kill=kill)
        told += f"{kill}, "
        wrong += [f"hangs, {done.told}"] if done.code is None else []
        if not done.killed:
            break
        verdict.kills += 1
        if draw.random() < 0.5:
            leftovers(PATIENCE)  # else the next command meets what this one has started
    done = run()
    if done.refusal() is None and "another process" in done.err:
        leftovers(wanted.timeout)
        done = run()
    found = difference(wanted.tree, tree(folder, job.loose))
    if done.code != 0 and (found or "exists already" not in done.err):  # killed when all was done
        wrong.append(f"run again: {done.told}")
    elif found:
        wrong.append(found)
    if alive := leftovers(PATIENCE):
        wrong.append(f"processes left over: {', '.join(alive)}")
    verdict.failures += [(number, f"{told[:-2]}: {text}") for text in wrong]
    return verdict


LIMITS = {"descriptors": resource.RLIMIT_NOFILE, "file-size": resource.RLIMIT_FSIZE}
# kind -> number of cases, jobs, and the bounds of how many descriptors or bytes are left
HINDRANCES: dict[str, tuple[int, tuple[str, ...], int, int]] = {
    "full-disk": (25, ("train", "arrow", "predict", "report", "shapes"), 4096, 2_000_000),
    "read-only": (5, ("train", "arrow", "predict", "report", "shapes"), 1, 1),
    "read-only-data": (2, ("train", "arrow"), 1, 1),
    "shared-memory": (4, ("train-workers",), 4096, 300_000),
    "descriptors": (9, ("train-workers", "train", "predict"), 12, 64),
    "file-size": (9, ("train", "arrow", "predict"), 200, 600_000),
}


def hindered(kind: str, shop: Workshop, number: int, draw: random.Random) -> Verdict:
    """Runs a command with something missing: it succeeds or says so. Then with all there: as undisturbed."""
    _, jobs, low, high = HINDRANCES[kind]
    name = jobs[number % len(jobs)]
    job, wanted, folder, verdict = JOBS[name], shop.reference(name), shop.empty(), Verdict()
    amount = round(low * (high / low) ** draw.random())
    shop.prepared(job.base)
    if kind not in LIMITS:
        try:
            _enter_namespace()
            _mount("-t", "tmpfs", "-o", "size=64M", "tmpfs", folder)
        except (OSError, subprocess.CalledProcessError) as error:
            return Verdict(tried=0, skipped=f"namespaces are not permitted here: {error}")
    shop.project(job.base, folder)
    give_back = _take_away(kind, folder, amount)
    limits = {LIMITS[kind]: amount} if kind in LIMITS else None
    done = command(job.line, folder, timeout=wanted.timeout, limits=limits)
    wrong = [done.refusal()] if done.code != 0 else []
    give_back()
    if done.code != 0:
        done = command(job.line, folder, timeout=wanted.timeout)
    wrong.append(difference(wanted.tree, tree(folder, job.loose)) if done.code == 0 else f"then: {done.told}")
    if shop.keep and kind not in LIMITS:
        shutil.copytree(folder, folder.with_name("kept"))
    verdict.failures += [(number, f"{name}, {amount}: {text}") for text in wrong if text]
    return verdict


def _take_away(kind: str, folder: Path, amount: int) -> Callable[[], object]:
    """Takes something away from the project; returns what gives it back."""
    if kind == "full-disk":
        there = os.statvfs(folder)
        with (folder / "ballast").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, there.f_bavail * there.f_frsize - amount))
        return (folder / "ballast").unlink
    place: Path | str = folder if kind == "read-only" else "/dev/shm"
    if kind == "read-only-data":
        place = folder / "coco"
        content = shutil.copytree(place, folder.with_name("coco"))
        _mount("-t", "tmpfs", "tmpfs", place)
        shutil.copytree(content, place, dirs_exist_ok=True)
    if kind.startswith("read-only"):
        _mount("-o", "remount,ro", place)
        return partial(_mount, "-o", "remount,rw", place)
    if kind == "shared-memory":
        _mount("-t", "tmpfs", "-o", f"size={amount}", "tmpfs", place)
        return partial(_mount, "-o", "remount,size=64M", place)
    return lambda: None


def _enter_namespace() -> None:
    """Gives this process mounts of its own, which end with it."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000 | 0x20000) != 0:  # CLONE_NEWUSER, CLONE_NEWNS
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(text)
    _mount("--make-rprivate", "/")


def _mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


class Group(NamedTuple):
    """Broken inputs that meet one command.

    Attributes:
        judged: what must be as without the fault where the input is accepted: all files, what the command says, what
            it finds in the twin of a photo.
        owned: files that the command may change.
    """

    rows: list[inputs.Broken]
    job: str
    judged: Literal["files", "words", "twin", "exit code"] = "exit code"
    owned: str = r"^$"


GROUPS = {
    "images": Group(inputs.IMAGES, "photo", "twin"),
    "annotations": Group(inputs.ANNOTATIONS, "train"),
    "runs": Group(inputs.RUNS, "train"),
    "studies": Group(inputs.STUDIES, "dry-run"),
    "splits": Group(inputs.SPLITS, "split"),
    "models": Group(inputs.MODELS, "photo"),
    "checkpoints": Group(inputs.CHECKPOINTS, "resume", "files", owned=f"^{inputs.RUN}"),
    "folders": Group(inputs.FOLDERS, "train"),
    "begun": Group(inputs.BEGUN, "resume", owned=f"^{inputs.RUN}"),
    "results": Group(inputs.RESULTS, "status", "words"),
}


def broken(name: str, shop: Workshop, number: int, draw: random.Random) -> Verdict:
    """A command meets a broken input: it says so in a sentence or is right, and nothing of the user's is lost."""
    group = GROUPS[name]
    row, job, wanted = group.rows[number], JOBS[group.job], shop.reference(group.job)
    folder = shop.project(job.base)
    row.spoil(folder)
    before = tree(folder, r"^$")
    done = command(job.line, folder, timeout=wanted.timeout)
    after = tree(folder, r"^$")
    changed = [path for path in before if before[path] != after.get(path) and not re.match(group.owned, path)]
    wrong = f"changed or lost: {', '.join(changed[:5])}" if changed else ""
    if (folder / "intruded").exists():
        wrong = "ran code of the file"
    elif done.code != 0:
        wrong = done.refusal((1, 2) if group.job == "photo" else (2,)) or wrong
        wrong = wrong or (f"refused: {done.told}" if row.expect == "right" else "")
    elif row.expect == "refused":
        wrong = "taken without a word"
    elif group.judged == "files":
        wrong = wrong or difference(wanted.tree, tree(folder, job.loose))
    elif group.judged == "words" and done.out != wanted.out:
        wrong = f"says something else: {done.out}"
    elif group.judged == "twin":
        found = (folder / "predictions/results.json").read_bytes()
        if (folder / "twin.png").exists():
            shutil.copy(folder / "twin.png", folder / "photo.png")
        command(job.line, folder, timeout=wanted.timeout)
        wrong = "" if (folder / "predictions/results.json").read_bytes() == found else "read as other colours"
    return Verdict(failures=[(number, f"{row.name}: {wrong}")] if wrong else [])


def mutated(kind: str, shop: Workshop, number: int, draw: random.Random) -> Verdict:
    """Reads a series of mutated files in this process."""
    verdict, folder = Verdict(tried=MUTATIONS_PER_CASE), shop.empty()
    warnings.simplefilter("ignore")
    for one in range(number * MUTATIONS_PER_CASE, (number + 1) * MUTATIONS_PER_CASE):
        shop.progress[:] = one.to_bytes(8, "little")
        if wrong := mutation(kind, shop.seed, one, folder):
            verdict.failures.append((one, wrong))
    return verdict


def mutation(kind: str, seed: int, number: int, folder: Path, *, loud: bool = False) -> str | None:
    """Reads one mutated file, which stays in the folder; the exception that is no sentence, if there is one."""
    from semiseg.errors import UserError

    what = inputs.MUTATIONS[kind]
    path = folder / what.file
    path.write_bytes(what.mutated(random.Random(f"{kind}:{seed}:{number}")))
    try:
        what.read(path)
    except UserError:
        return None
    except Exception as error:
        if loud:
            traceback.print_exc()
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if "semiseg" in frame.filename]
        place = f"{Path(places[-1].filename).name}, {places[-1].name}" if places else "benchmark"
        return f"{type(error).__name__} in {place}: {str(error)[:100]}"
    return None


# The series ----------------------------------------------------------------------------------------------------------

KILLS = {"train": 60, "train-workers": 30, "study": 20, "arrow": 30, "evaluate": 15, "predict": 30, "report": 15}
CATEGORIES: dict[str, tuple[int, Attack]] = {
    **{f"kills.{job}": (count, partial(killed, job)) for job, count in {**KILLS, "shapes": 15}.items()},
    **{f"resources.{kind}": (row[0], partial(hindered, kind)) for kind, row in HINDRANCES.items()},
    **{f"inputs.{name}": (len(group.rows), partial(broken, name)) for name, group in GROUPS.items()},
    **{
        f"mutations.{kind}": (m.number // MUTATIONS_PER_CASE, partial(mutated, kind))
        for kind, m in inputs.MUTATIONS.items()
    },
}


def one_case(shop: Workshop, category: str, number: int) -> Verdict:
    """A case in a process of its own; its folder is removed afterwards."""
    draw = random.Random(f"{category}:{shop.seed}:{number}")
    try:
        verdict: Verdict = in_a_fork(partial(CATEGORIES[category][1], shop, number, draw))
        return verdict
    except ChildProcessError as error:
        first = int.from_bytes(shop.progress[:], "little") if category.startswith("mutations") else number
        return Verdict(failures=[(first, f"the process that tried it {error}")])
    finally:
        for folder in () if shop.keep else shop.folder.glob("case-*"):
            shutil.rmtree(folder, ignore_errors=True)


def series(shop: Workshop, categories: Sequence[str], *, limit: int, minutes: float) -> dict[str, Verdict]:
    """Runs cases of all categories in turn until they or the time are over; prints each kind of failure as it comes."""
    totals, seen, began = {name: Verdict(tried=0) for name in categories}, set(), time.monotonic()
    sizes = {name: min(CATEGORIES[name][0], limit) for name in categories}
    cases = [(name, number) for number in range(limit) for name in categories if number < sizes[name]]
    for name, number in tqdm(cases, unit="case", disable=None):
        if time.monotonic() - began > 60 * minutes:
            break
        verdict, total = one_case(shop, name, number), totals[name]
        total.tried += verdict.tried
        total.kills += verdict.kills
        total.failures += verdict.failures
        total.skipped = verdict.skipped or total.skipped
        for failed, text in verdict.failures:
            if (kind := kind_of(name, text)) not in seen:
                seen.add(kind)
                tqdm.write(f"{name}:{shop.seed}:{failed}  {text}")
                sys.stdout.flush()
    return totals


def kind_of(category: str, text: str) -> tuple[str, str]:
    """Failures of one kind differ in numbers and temporary names, and those after kills in when these came."""
    outcome = text.partition(": ")[2] if category.startswith("kills") else text
    return category, re.sub(r"[0-9]+", "#", re.sub(r"(?<=[ /])\.[^ ,;/]+", ".*", outcome))


def as_markdown(totals: Mapping[str, Verdict], *, seed: int, heading: str) -> str:
    """The table of counts, and each kind of failure with the case that repeats it."""
    lines = [heading, "", "| attack | tried | survived | failed | |", "|---|---:|---:|---:|---|"]
    for name, verdict in totals.items():
        remark = f"{verdict.kills} kills" if verdict.kills else verdict.skipped
        lines.append(f"| {name} | {verdict.tried} | {verdict.survived} | {verdict.failed} | {remark} |")
    tried, survived, failed, kills = (
        sum(getattr(verdict, what) for verdict in totals.values()) for what in ("tried", "survived", "failed", "kills")
    )
    lines.append(f"| all | {tried} | {survived} | {failed} | {kills} kills |")
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, verdict in totals.items():
        for number, text in verdict.failures:
            kinds.setdefault(kind_of(name, text), []).append(f"`{name}:{seed}:{number}`: {text}")
    if kinds:
        lines += ["", "Failures, each kind once (`python -m benchmarks.faults --repeat CASE` does a case again):", ""]
    lines += [f"* {found[0]} ({len(found)} of this kind)".replace("\n", " ") for found in kinds.values()]
    return "\n".join(lines) + "\n"


def repeat(shop: Workshop, case: str) -> None:
    """Does one case again and says where its folder is."""
    category, seed, number = case.split(":")
    shop.seed, shop.keep = int(seed), True
    if category.startswith("mutations."):
        folder = shop.empty()
        print(mutation(category.partition(".")[2], shop.seed, int(number), folder, loud=True) or "survived", folder)
        return
    verdict = one_case(shop, category, int(number))
    print("\n".join(text for _, text in verdict.failures) or verdict.skipped or "survived")
    print(f"folders, and beside them what the last command printed: {shop.folder}/case-*")


def import_all() -> None:
    """Imports every module of semiseg, so that the commands forked from this process need not."""
    package = importlib.import_module("semiseg")
    for module in pkgutil.walk_packages(package.__path__, "semiseg."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def main() -> None:
    """Parses the command line, runs the series, prints and writes the counts; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="kills, kills.train, ... Repeatable.")
    parser.add_argument("--quick", action="store_true", help="at most five cases of each kind")
    parser.add_argument("--count", type=int, default=10**6, help="at most so many cases of each kind")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no case after so many minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", metavar="CASE", help="one case again, as a failure is named")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and failures")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the marks of a Markdown file")
    asked = parser.parse_args()
    chosen = [name for name in CATEGORIES if any(f"{name}.".startswith(f"{part}.") for part in asked.only or [name])]
    import_all()
    shop, began = Workshop(Path(tempfile.mkdtemp(prefix="semiseg-faults-")), asked.seed), time.monotonic()
    if asked.repeat:
        repeat(shop, asked.repeat)
        return
    limit = min(asked.count, 5 if asked.quick else 10**6, max(CATEGORIES[name][0] for name in chosen))
    try:
        totals = series(shop, chosen, limit=limit, minutes=asked.minutes)
    finally:
        shutil.rmtree(shop.folder, ignore_errors=True)
    typed = shlex.join(["python", "-m", "benchmarks.faults", *sys.argv[1:]])
    asking = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    revision = subprocess.run(asking, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    about = f"revision {revision}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores"
    heading = f"`{typed}`: {about}, {(time.monotonic() - began) / 60:.0f} minutes."
    text = as_markdown(totals, seed=asked.seed, heading=heading)
    print(text)
    if asked.json:
        found = {name: {**asdict(verdict), "survived": verdict.survived} for name, verdict in totals.items()}
        asked.json.write_text(json.dumps({"about": heading, "categories": found}, indent=1) + "\n")
    if asked.write:
        before, _, rest = asked.write.read_text().partition(BEGIN)
        asked.write.write_text(f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}")
    sys.exit(any(verdict.failures for verdict in totals.values()))


if __name__ == "__main__":
    main()
