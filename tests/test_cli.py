"""The command line: quick help, one sentence and exit code 2 for bad input, and every verb that trains nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from semiseg import __version__, cli, project
from semiseg.cli import VERBS, app, conversions, data_sets, splits
from semiseg.commands import study as study_commands
from semiseg.commands.known_classes import COCO_CLASSES
from semiseg.data.shapes import SHAPES_CLASSES
from semiseg.errors import UserError
from semiseg.project import find, packaged_root
from semiseg.studies.file import load_study
from tests.committed import committed_reports

REPOSITORY = Path(__file__).parent.parent


def call(*arguments: str, code: int = 0) -> str:
    """What the command prints, its errors included."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(name="annotations")
def _annotations(folder: Path) -> Path:
    """Two classes: a cat with a mask and one without, a crowd of cats, a dog with a mask."""
    square = [[1, 1, 5, 1, 5, 5, 1, 5]]
    box = {"image_id": 1, "bbox": [1, 1, 4, 4], "area": 16}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 8, "width": 8}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
        "annotations": [
            {**box, "id": 1, "category_id": 7, "iscrowd": 0, "segmentation": square},
            {**box, "id": 2, "category_id": 7, "iscrowd": 0},
            {**box, "id": 3, "category_id": 7, "iscrowd": 1, "segmentation": square},
            {**box, "id": 4, "category_id": 3, "iscrowd": 0, "segmentation": square},
        ],
    }
    (folder / "val.json").write_text(json.dumps(content))
    return folder / "val.json"


def test_help_answers_without_what_takes_long_to_import() -> None:
    code = "import sys; sys.argv[1:] = ['--help']; from semiseg.__main__ import main\ntry: main()\nfinally: "
    code += "print(sorted({'torch', 'pandas', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    verbs = ("train", "evaluate", "predict", "run", "status", "report", "split", "data")
    assert all(verb in done.stdout for verb in verbs)


def test_every_verb_has_help_with_an_example() -> None:
    for verb in every_verb():
        text = call(*verb, "--help")
        assert "Example" in text, verb
        assert f"semiseg {' '.join(verb)}" in text, verb


def test_summaries_of_verbs_are_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for group in {verb[:-1] for verb in every_verb()}:
        lines = call(*group, "--help").split("Commands:\n")[1].splitlines()
        assert lines
        assert not [line for line in lines if line.endswith(("...", "…"))]


def every_verb() -> list[tuple[str, ...]]:
    groups = {splits: ("split",), data_sets: ("data",), conversions: ("convert",), app: ()}
    return [(*groups[group], name) for group, verbs in VERBS.items() for name in verbs]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("trian", "no such command 'trian'. Did you mean 'train'?"),
        ("xyz", "no such command 'xyz'; see 'semiseg --help'"),
        ("split mak", "no such command 'mak'. Did you mean 'make'?"),
        ("predict m i.png", "missing option '--out'; see 'semiseg predict --help'"),
        ("run shapes --jbos 2", "no such option: --jbos"),
        ("run shapes --jobs many", "invalid value for '--jobs': "),
        ("train a.toml b.toml", "got unexpected extra argument"),
    ],
)
def test_a_line_that_no_verb_takes_is_one_sentence(folder: Path, line: str, told: str) -> None:
    text = call(*line.split(), code=2)
    assert text.startswith(f"semiseg: {told}")
    assert text.count("\n") == 1


def test_a_group_alone_shows_its_help() -> None:
    assert call("split", code=2).startswith("Usage: semiseg split")


def test_version() -> None:
    assert call("--version") == f"semiseg {__version__}\n"


def test_bad_input_ends_with_one_sentence_and_code_2(folder: Path) -> None:
    """Through the real entry point: nothing on stdout, one line on stderr."""
    done = subprocess.run([sys.executable, "-m", "semiseg", "run", "shape"], capture_output=True, text=True, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("semiseg: shape: no such study")
    assert "Did you mean 'shapes'?" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_a_misspelt_name_is_compared_with_the_files_beside_it(folder: Path) -> None:
    for name, typed in (("mystudy", "mystud"), ("experiments/other", "othr"), ("more/third", "more/thrid.toml")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.toml").touch()
        assert f"Did you mean '{Path(name).name}'?" in call("run", typed, code=2)
    assert "Did you mean 'shapes'?" in call("status", "shaeps", code=2)


def test_a_misspelt_row_is_told_all_rows(folder: Path) -> None:
    rows = "neither, projection, projection+pairwise, learned, box-supervised, full-masks"
    for typed, near in (("neithr", " Did you mean 'neither'?"), ("xyz", "")):
        told = call("run", "shapes", "--only", typed, "--dry-run", code=2)
        assert told == f"semiseg: --only '{typed}': study 'shapes' has no such row.{near} Its rows: {rows}\n"


def test_an_interruption_ends_with_one_sentence_and_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt("stopped; the same command continues")

    monkeypatch.setattr("semiseg.studies.file.load_study", interrupt)
    assert call("status", "shapes", code=130) == "semiseg: stopped; the same command continues\n"


def test_other_exceptions_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("semiseg.studies.file.load_study", fail)
    assert isinstance(CliRunner().invoke(app, ["status", "shapes"]).exception, ZeroDivisionError)


def test_split_list_names_the_files(folder: Path) -> None:
    text = call("split", "list")
    for name in ("coco_voc20_seen", "coco_nonvoc60_seen", "shapes_few_seen", "shapes_many_seen"):
        assert any(line.startswith(name) and line.endswith(f"/splits/{name}.toml") for line in text.splitlines())
    assert "shipped" not in text  # beside them in the source tree may lie a user's own
    (folder / "splits").mkdir()
    (folder / "splits" / "own.toml").write_text('seen = ["a"]')
    assert "splits/own.toml" in call("split", "list")


def test_split_show_counts_every_class(annotations: Path) -> None:
    Path("mine.toml").write_text('seen = ["cat"]')
    text = call("split", "show", "mine", str(annotations))
    lines = [line.split() for line in text.splitlines()]
    #                 class  side  instances  mask  box  crowd
    assert lines[4:7] == [
        ["cat", "seen", "2", "1", "1", "1"],
        ["dog", "unseen", "1", "0", "1", "0"],
        ["all", "3", "1", "2", "1"],
    ]
    assert text.splitlines()[1] == "seen (masks): cat"
    assert text.endswith(f"seen, but without a single mask in {annotations}: no class\n")


def test_split_show_says_what_does_not_fit(annotations: Path) -> None:
    told = call("split", "show", "coco_voc20_seen", str(annotations), code=2)
    assert "coco_voc20_seen.toml: 'seen': unknown class 'person'" in told
    assert "(the split is written for coco)" in told
    Path("none.toml").write_text('seen = ["dog"]\n[fraction]\ndog = 0.0001')
    text = call("split", "show", "none", str(annotations))
    assert text.endswith(f"seen, but without a single mask in {annotations}: dog\n")
    assert call("split", "show", "none", code=2).startswith("semiseg: none.toml: no data set is named")


def test_split_make_draws_names_and_fractions(folder: Path) -> None:
    call("split", "make", "drawn", "--dataset", "shapes", "--seen", "3", "--seed", "0")
    shipped = (REPOSITORY / "splits" / "shapes_few_seen.toml").read_text()
    assert (folder / "splits" / "drawn.toml").read_text() == shipped.replace("shapes_few_seen", "drawn")
    assert "exists already" in call("split", "make", "drawn", "--dataset", "shapes", "--seen", "4", code=2)
    call("split", "make", "drawn", "--dataset", "shapes", "--seen", "4", "--force")
    assert "4 seen, 8 unseen" in call("split", "show", "drawn")
    call("split", "make", "named", "--dataset", "coco", "--seen", "cat, dog", "--seen", "tv")
    assert "3 seen, 77 unseen" in call("split", "show", "named")
    call("split", "make", "part", "--dataset", "coco", "--fraction", "0.1", "--fraction", "person=1", "--seed", "8")
    assert "share of masks kept (seed 8): all 0.1, except person 1\n" in call("split", "show", "part")
    told = call("split", "make", "tenth", "--dataset", "coco", "--fraction", "0.1")
    assert "share of masks kept (seed 0): all 0.1\n" in told
    told = call("split", "make", "few_cats", "--dataset", "coco", "--fraction", "cat=0.2", "--fraction", "dog=0.5")
    assert "share of masks kept (seed 0): all 1, except cat 0.2, dog 0.5\n" in told
    assert "share of masks kept" not in call("split", "show", "named")
    for arguments, told in (
        (("--seen", "Hot_Dog"), "unknown class 'Hot_Dog'. Did you mean 'hot dog'?"),
        (("--fraction", "cat=x"), "--fraction 'cat=x'"),
        (("--seen", "90"), "expected a number from 1 to 79"),
        ((), "give --seen or --unseen"),
    ):
        assert told in call("split", "make", "bad", "--dataset", "coco", *arguments, code=2)
    assert not (folder / "splits" / "bad.toml").exists()


def test_a_folder_that_may_not_be_written_is_said_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a superuser may write everywhere
    told = f"semiseg: {folder}: no permission to write there\n"
    assert call("data", "shapes", "drawn", "--images", "1", code=2) == told
    assert call("split", "make", "mine", "--dataset", "shapes", "--seen", "ring", "--out", "mine.toml", code=2) == told
    assert list(folder.iterdir()) == []


def test_known_classes_are_those_of_the_data() -> None:
    assert (COCO_CLASSES[0], COCO_CLASSES[62 - 5], COCO_CLASSES[-1]) == ("person", "couch", "toothbrush")
    assert len(SHAPES_CLASSES) == 12


def test_data_check_exits_with_2_on_errors_only(annotations: Path) -> None:
    assert "no errors" in call("data", "check", str(annotations))
    content = json.loads(annotations.read_text())
    content["annotations"][0]["category_id"] = 99
    annotations.write_text(json.dumps(content))
    assert "category id is unknown" in call("data", "check", str(annotations), code=2)
    assert call("data", "check", "none.json", code=2) == "semiseg: none.json: no such annotation file\n"
    assert call("data", "check", ".", code=2) == "semiseg: .: is a folder, expected a COCO json\n"


def test_run_dry_and_status_train_nothing(folder: Path) -> None:
    text = call("run", "shapes", "--dry-run", "--only", "neither", "--seeds", "3,4")
    assert "6 of 6 runs to train" in text
    assert "shapes: 0 done, 0 recorded, 0 started, 11 missing" in call("status", "shapes")
    assert list(folder.iterdir()) == []
    assert "--seeds '1,x'" in call("status", "shapes", "--seeds", "1,x", code=2)


def test_status_without_the_data_lists_the_runs(folder: Path) -> None:
    text = call("status", "coco_tau")
    (told,) = [line for line in text.splitlines() if line.startswith("coco_tau: ")]
    assert "which of them are done cannot be told without the data: data/coco" in told
    listed = [line for line in text.splitlines() if "unknown" in line]
    assert told.startswith(f"coco_tau: {len(listed)} runs; ")
    assert len(listed) > 1
    assert list(folder.iterdir()) == []


def test_a_report_elsewhere_reads_the_studys_own_record(folder: Path) -> None:
    own = folder / "reports" / "shapes" / "results.jsonl"
    own.parent.mkdir(parents=True)
    shutil.copy(committed_reports() / "shapes" / "results.jsonl", own)
    before = own.read_bytes()
    told = call("report", "shapes", "--out", "out")
    assert "report: out/report.md\nto open: out/index.html\n" in told
    assert (folder / "out" / "index.html").is_file()
    lines = (folder / "out" / "tables" / "table6.csv").read_text().splitlines()
    assert lines[0].startswith("row,projection,pairwise,seeds,all_AP,all_AP50,all_AP75,unseen_AP")
    assert [line.split(",")[0] for line in lines[1:]] == [
        "neither", "projection", "projection+pairwise", "learned", "box-supervised", "full-masks",
    ]  # fmt: skip
    assert all(line.split(",")[3] == "1" and float(line.split(",")[4]) > 0 for line in lines[1:])
    assert own.read_bytes() == before
    assert [path.name for path in own.parent.iterdir()] == ["results.jsonl"]
    # A folder with a record of its own is reported from that.
    (folder / "mine").mkdir()
    (folder / "mine" / "results.jsonl").write_text("")
    call("report", "shapes", "--out", "mine")
    call("report", "shapes", "--without-pictures", "--out", "bare")
    page = Path("bare/report.md").read_text(encoding="utf-8")
    assert "Pictures" not in page
    assert "semiseg report shapes --without-pictures --out bare" in page
    assert "table6 lacks `neither` seed 0" in (folder / "mine" / "report.md").read_text()
    assert "semiseg run shapes --out mine" in (folder / "mine" / "report.md").read_text()


def test_a_folder_with_what_no_report_wrote_is_refused(folder: Path) -> None:
    own = folder / "reports" / "shapes" / "results.jsonl"
    own.parent.mkdir(parents=True)
    shutil.copy(committed_reports() / "shapes" / "results.jsonl", own)
    ids = [json.loads(line)["run_id"] for line in own.read_text().splitlines()[:2]]
    (folder / "site").mkdir()
    (folder / "site" / "index.html").write_text("mine")
    for verb in (("report", "shapes"), ("run", "shapes"), ("compare", *ids)):
        told = call(*verb, "--out", "site", code=2)
        assert told == (
            "semiseg: site: holds what no report wrote: index.html; give a new or an empty folder as --out\n"
        )
    assert [path.read_text() for path in (folder / "site").iterdir()] == ["mine"]
    call("report", "shapes", "--out", "out")
    (folder / "out" / "notes.txt").write_text("mine")
    call("report", "shapes", "--out", "out")  # beside those of a report other files may stand
    (folder / "out" / "index.html").unlink()
    assert "notes.txt" in call("report", "shapes", "--out", "out", code=2)


def test_a_report_of_nothing_is_refused(folder: Path) -> None:
    told = call("report", "shapes", "--out", "out", code=2)
    assert "out and reports/shapes: no recorded results; 'semiseg run shapes' makes them" in told
    assert "reports/coco_tau: no recorded results" in call("report", "coco_tau", code=2)
    assert list(folder.iterdir()) == []


def test_a_report_of_results_that_are_not_the_studys_needs_no_data(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "results.jsonl").write_text("")
    call("report", "coco_voc_splits", "--out", "mine")
    assert "table6 lacks `neither` seed 0" in (folder / "mine" / "report.md").read_text()


def test_a_study_names_a_reference_that_is_there(folder: Path) -> None:
    text = find("experiments", "shapes").read_text(encoding="utf-8")
    (folder / "mine.toml").write_text(text.replace('reference = "shapes_seeds"', 'reference = "shapes_sedes"'))
    with pytest.raises(UserError, match=r"shapes_sedes: no such study.*Did you mean 'shapes_seeds'"):
        load_study("mine.toml")


def test_printed_numbers_that_are_not_there_are_said_before_any_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = find("experiments", "shapes").read_text(encoding="utf-8").replace("number = 6", "number = 66")
    for name in ("bases", "splits"):
        shutil.copytree(packaged_root() / ("experiments" if name == "bases" else "") / name, folder / name)
    (folder / "mine.toml").write_text(text.replace('base = "shapes"', 'base = "bases/shapes"'))
    told = call("run", "mine.toml", "--out", "out", code=2)
    assert "study 'mine', table 'table6': 'number' is 66, which" in told
    assert "boxinst.csv does not hold: 2, tau" in told
    (folder / "mine.toml").write_text((folder / "mine.toml").read_text().replace('reference = "shapes_seeds"', ""))
    monkeypatch.setattr(project, "packaged_root", lambda: folder / "nowhere")
    assert "boxinst: no such table of printed numbers" in call("run", "mine.toml", "--out", "out", code=2)
    assert not (folder / "runs").exists()
    assert not (folder / "out").exists()


def test_train_needs_a_config_and_a_folder(folder: Path) -> None:
    assert "train needs CONFIG and --out" in call("train", code=2)
    assert "leave out CONFIG" in call("train", "x.toml", "--replay", "f.pt", code=2)
    assert "gone.json: no such file" in call("train", "gone.json", "--out", "o", code=2)
    (folder / "run.json").write_text('{"seed": 1, "optim": {"stesp": 3}}')
    assert "run.json: unknown key 'optim.stesp'. Did you mean 'steps'?" in call(
        "train", "run.json", "--out", "o", code=2
    )
    (folder / "run.json").write_text("[")
    assert "run.json: not valid JSON" in call("train", "run.json", "--out", "o", code=2)
    assert not (folder / "o").exists()


def test_evaluate_says_a_misspelt_split_before_it_starts(folder: Path) -> None:
    assert "no such class split" in call("evaluate", "runs/x", "--split", "shapes_few", code=2)
    assert "a.json: no such annotation file" in call("evaluate", "runs/x", "--annotations", "a.json", code=2)
    (folder / "a.json").touch()
    assert "both --annotations and --images" in call("evaluate", "runs/x", "--annotations", "a.json", code=2)


def test_the_recorded_command_repeats_the_study() -> None:
    command = study_commands._command("shapes", ["optim.steps=3"], "0,1", Path("out"))
    assert command == ["semiseg", "run", "shapes", "--set", "optim.steps=3", "--seeds", "0,1", "--out", "out"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "semiseg: not enough memory\n"),
        (RuntimeError("could not create a primitive"), "semiseg: not enough memory (could not create a primitive)\n"),
        (OSError(27, "File too large"), "semiseg: File too large\n"),
    ],
)
def test_what_a_machine_lacks_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, told: str
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        cli.errors_as_sentences(fail)()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == told


def test_an_error_in_an_override_names_it_and_not_the_file(folder: Path) -> None:
    (folder / "run.toml").write_text("optim = { steps = 4, learning_rate = 'fast' }\n")
    typo = call(
        "train", "run.toml", "--out", "out", "--set", "optim.learning_rat=3", "--set", "optim.learning_rate=0.1", code=2
    )
    assert (
        typo == "semiseg: --set optim.learning_rat=3: unknown key 'optim.learning_rat'. Did you mean 'learning_rate'?\n"
    )
    value = call("train", "run.toml", "--out", "out", "--set", "optim.batch_size=4x", code=2)
    assert "--set optim.batch_size=4x: 'optim.batch_size': " in value
    assert "run.toml: 'optim.learning_rate': " in value
