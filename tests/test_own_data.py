"""docs/OWN_DATA.md does what it says: every block is run in order, with fewer images and steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from semiseg.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "OWN_DATA.md"
SMALLER = {"--images 1500": "--images 12", "--images 100": "--images 4", "steps = 1500": "steps = 2"}
SMALLER |= {"batch_size = 8": "batch_size = 4"}


def blocks() -> list[tuple[str, str, str]]:
    """(the file named before it, language, text) of each fenced block; those without a language need a download."""
    text = PAGE.read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in text, f"the page no longer says {large!r}"
        text = text.replace(large, small)
    return re.findall(r"(?:`(\w+\.toml)`:\n\n)?^```(\w*)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.* objects of seen classes have no mask")  # the page says so
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for name, language, text in blocks():
        if language == "toml":
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif language == "json":
            assert set(json.loads(text)) == {"images", "categories", "annotations"}
        elif language == "sh":
            for line in text.splitlines():
                program, *arguments = shlex.split(line, comments=True)
                assert program == "semiseg"
                result = CliRunner().invoke(app, arguments)
                assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
                ran.append(arguments[0])
    assert ran.count("train") == 4
    assert {"data", "evaluate", "predict", "split", "run"} <= set(ran)
    content = json.loads((tmp_path / "data/toy/train/annotations.json").read_text(encoding="utf-8"))
    with_mask = ["segmentation" in annotation for annotation in content["annotations"]]
    assert sum(with_mask) == -(-len(with_mask) // 5)
    assert len(list((tmp_path / "predictions" / "overlays").iterdir())) == 4
    assert isinstance(json.loads((tmp_path / "predictions" / "results.json").read_text(encoding="utf-8")), list)
