"""`weightsmith evidence`: from a checkout, from an installed package, and with wrong arguments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import weightsmith

SOURCE = Path(weightsmith.__file__).parent
ROOT = Path(__file__).parents[2]
SCRIPT = '''"""Does one and one make two?

More words.
"""
from script import parser_of, publish

if __name__ == "__main__":
    chosen = parser_of(__doc__, "quick").parse_args()
    results = {"seeds": chosen.seeds, "verdict": "reproduced", "quick": chosen.quick}
    publish("sums", chosen, results, "# Sums\\n\\nThey add up.\\n")
'''


@pytest.fixture
def installed(tmp_path):
    """A package as a wheel lays it out, with an evidence of its own; the folder to put on the path."""
    package = tmp_path / "site" / "weightsmith"
    package.mkdir(parents=True)
    for child in SOURCE.iterdir():
        (package / child.name).symlink_to(child)
    (package / "evidence").mkdir()
    (package / "evidence" / "script.py").write_text((ROOT / "evidence" / "script.py").read_text())
    (package / "evidence" / "sums.py").write_text(SCRIPT)
    return package.parent


def run(*arguments, path, cwd):
    program = "from weightsmith.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, "evidence", *arguments],
        env={**os.environ, "PYTHONPATH": str(path)},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installed_package_runs_its_evidence_and_writes_the_page(installed, tmp_path):
    done = run("sums", "--quick", "--seeds", "4,5", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "evidence-sums"
    assert json.loads((folder / "sums.json").read_text()) == {
        "seeds": [4, 5],
        "verdict": "reproduced",
        "quick": True,
    }
    assert done.stdout.splitlines()[-1] == str(folder / "sums.html")
    assert "They add up." in (folder / "sums.html").read_text()


def test_without_a_name_all_are_listed_with_what_they_ask(installed, tmp_path):
    shown = run(path=installed, cwd=tmp_path)
    assert shown.returncode == 0
    assert "Does one and one make two?" in shown.stdout
    assert "script" not in shown.stdout
    assert "sewa" in run(path=SOURCE.parent, cwd=tmp_path).stdout  # from a checkout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["summs"], "no evidence `summs`; did you mean `sums`?; known: sums"),
        (["sums", "--seeds", "0;1"], "--seeds: expected numbers with commas between them, got `0;1`"),
    ],
)
def test_wrong_arguments_are_one_line(installed, tmp_path, arguments, words):
    failed = run(*arguments, path=installed, cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.strip() == f"error: {words}"
    assert not (tmp_path / "runs").exists()


def test_a_package_without_scripts_says_so(installed, tmp_path):
    for file in (installed / "weightsmith" / "evidence").iterdir():
        file.unlink()
    failed = run(path=installed, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: evidence: no scripts in ")
