"""docs/PSEUDO_MASKS.md does what it says: every block but SAM's is run in order, with fewer images and steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from semiseg.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "PSEUDO_MASKS.md"
SMALLER = {"--images 500": "--images 4", "steps = 500": "steps = 2"}

pytest.importorskip("cv2")


@pytest.mark.filterwarnings("ignore:.*pseudo masks for")  # says how many fit
def test_every_block_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    for large, small in SMALLER.items():
        assert large in text, f"the page no longer says {large!r}"
        text = text.replace(large, small)
    blocks = re.findall(r"^```([\w-]+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    (configuration,) = (block for language, block in blocks if language == "toml")
    (tmp_path / "run.toml").write_text(configuration, encoding="utf-8")
    (sam,) = (block for language, block in blocks if language == "python-sam")
    compile(sam, str(PAGE), "exec")
    ran = []
    for line in "".join(block for language, block in blocks if language == "sh").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "semiseg"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
        ran.append(arguments[0])
    assert ran == ["data", "pseudo", "pseudo", "train", "evaluate", "evaluate"]
    assert len(list((tmp_path / "data/toy/pseudo").glob("grabcut-*.json"))) == 1
