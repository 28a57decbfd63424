"""The program as a user meets it: whole processes, their output, their exit codes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

PROGRAM = str(Path(sys.executable).with_name("weightsmith"))


def weightsmith(*args, cwd=None):
    return subprocess.run(
        [PROGRAM, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny checkpoints and a page that averages them."""
    folder = tmp_path_factory.mktemp("models")
    for index, name in enumerate(("a", "b")):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
        weights = {"model.layers.0.w": np.full((4, 4), float(index), np.float32)}
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "merge.yml").write_text("method: linear\nmodels: [a, b]\n")
    (folder / "matrices.yml").write_text("method: tsvm\nbase: a\nmodels: [b]\n")
    return folder


COMMANDS = ("run", "merge", "average", "evaluate", "inspect", "trace", "report", "evidence", "methods")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_ends_with_an_example_of_it(command):
    shown = weightsmith(command, "--help")
    assert shown.returncode == 0
    assert f"Example: weightsmith {command}" in shown.stdout


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from weightsmith.cli.main import main; sys.argv = ['weightsmith', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'rich', 'jinja2', 'ruamel'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip().endswith("[]")


def test_a_warning_is_one_line():
    program = (
        "import sys, warnings; from weightsmith.cli import main, methods; "
        "methods.register = lambda app: app.command('methods')(lambda: warnings.warn('two\\nlines')); "
        "sys.argv = ['weightsmith', 'methods']; main.main()"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stderr == "warning: two lines\n"


def test_a_merge_from_page_to_folder_to_family_tree(models, tmp_path):
    checked = weightsmith("merge", "merge.yml", tmp_path / "out", "--check", "--json", cwd=models)
    assert json.loads(checked.stdout)["parameters"] == 16
    assert not (tmp_path / "out").exists()
    merged = weightsmith("merge", "merge.yml", tmp_path / "out", "--json", cwd=models)
    assert json.loads(merged.stdout)["parameters"] == 16
    predicted = json.loads(checked.stdout)["prediction"]["disk_bytes"]
    assert predicted == sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    tree = json.loads(weightsmith("trace", tmp_path / "out", "--search", models, "--json").stdout)
    assert [child["found"] for child in tree["inputs"]] == [str(models / "a"), str(models / "b")]
    seen = json.loads(weightsmith("inspect", tmp_path / "out", "--norms", "--json").stdout)
    assert seen["norms"]["model.layers.0.w"]["rms"] == 0.5


def test_all_methods_make_a_folder_with_a_page_that_needs_nothing_else(models, tmp_path):
    out = tmp_path / "all"
    checked = weightsmith(
        "merge", "merge.yml", out, "--method", "linear", "--method", "karcher", "--check", cwd=models
    )
    assert "2 methods:" in checked.stdout
    assert not out.exists()
    args = ("merge", "merge.yml", out, "--method", "linear", "--method", "karcher")
    made = weightsmith(*args, cwd=models)
    assert made.returncode == 0, made.stderr
    assert weightsmith("merge", "merge.yml", tmp_path / "linear", cwd=models).returncode == 0
    weights = "model.safetensors"
    assert (out / "linear" / weights).read_bytes() == (tmp_path / "linear" / weights).read_bytes()
    page = (out / "report.html").read_text()
    assert "karcher" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page
    told = json.loads(weightsmith(*args, "--json", cwd=models).stdout)
    assert [entry["method"] for entry in told["methods"]] == ["linear", "karcher"]
    assert told["finished"]
    assert json.loads((out / "comparison.json").read_text())["cosine"] == told["cosine"]
    (out / "report.html").unlink()
    assert weightsmith("report", out).returncode == 0
    assert (out / "report.html").read_text() == page


def test_a_single_method_takes_the_place_of_the_pages(models, tmp_path):
    made = weightsmith("merge", "matrices.yml", tmp_path / "out", "--method", "linear", "--json", cwd=models)
    assert json.loads(made.stdout)["method"] == "linear"


def test_average_is_the_linear_merge(models, tmp_path):
    assert weightsmith("average", models / "a", models / "b", tmp_path / "mean").returncode == 0
    assert weightsmith("merge", "merge.yml", tmp_path / "linear", cwd=models).returncode == 0
    files = [tmp_path / name / "model.safetensors" for name in ("mean", "linear")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("merge", "missing.yml", "out"), "missing.yml"),
        (("run", "missing.yaml"), "missing.yaml"),
        (("inspect", "./nowhere"), "nowhere"),
        (("trace", "./nowhere"), "nowhere"),
        (("report", "./nowhere"), "nowhere"),
        (("average", "a", "out"), "two states"),
        (("merge", "merge.yml", "out", "--threads", "0"), "--threads"),
        (("merge", "merge.yml", "out", "--method", "all", "--ray", "auto"), "--ray: is for one merge"),
        (("merge", "merge.yml", "out", "--method", "liner"), "did you mean `linear`?"),
        (("merge", "merge.yml", "out", "--evaluate", "docs"), "--evaluate: is for comparisons"),
        (("merge", "merge.yml", "out", "--keep", "best", "--method", "all"), "`best` needs tasks"),
        (("merge", "matrices.yml", "out", "--device", "banana"), "no device `banana`"),
        (("evaluate", "./nowhere", "--task", "source"), "nowhere"),
    ],
)
def test_bad_input_is_one_line_that_names_it_and_exit_code_2(args, named, models):
    answer = weightsmith(*args, cwd=models)
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert named in answer.stderr
    assert answer.stdout == ""


def test_debug_shows_the_traceback(models):
    answer = weightsmith("--debug", "merge", "missing.yml", "out", cwd=models)
    assert answer.returncode != 0
    assert "Traceback" in answer.stderr


def test_a_fault_of_the_machine_is_one_line_and_exit_code_1(models, tmp_path):
    # A file-size limit stands for a full disk: the kernel refuses the write in the same way.
    shell = f"ulimit -f 0; trap '' XFSZ; exec {PROGRAM} average a b {tmp_path / 'out'}"
    answer = subprocess.run(["bash", "-c", shell], cwd=models, capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    assert len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("rum",), "No such command 'rum'. Did you mean 'run'? (see `weightsmith --help`)"),
        (("merge", "--foo"), "No such option: --foo (see `weightsmith merge --help`)"),
        (("run",), "Missing argument 'recipe' (see `weightsmith run --help`)"),
        (("methods", "--room", "mergin"), "no room `mergin`; did you mean `merging`?"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_2(args, said):
    answer = weightsmith(*args)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr.startswith("error: ")
    assert answer.stderr.endswith(f"{said}\n")
    assert answer.stderr.count("\n") == 1


def test_without_a_command_the_help_is_shown():
    answer = weightsmith()
    assert (answer.returncode, answer.stdout) == (2, "")
    assert "Example: weightsmith run" in answer.stderr


@pytest.mark.parametrize("command", ["run", "merge"])
def test_ctrl_c_is_one_line_that_says_what_goes_on_and_exit_code_130(command, tmp_path):
    os.mkfifo(tmp_path / "page.yml")  # the program waits here for its page
    args = [PROGRAM, command, "page.yml", *(["out"] if command == "merge" else [])]
    program = subprocess.Popen(args, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    with open(tmp_path / "page.yml", "w"):  # returns once it has come there
        program.send_signal(signal.SIGINT)
        said = program.communicate(timeout=60)[1]
    assert said == "error: interrupted; run the same command again to go on\n"
    assert program.returncode == 130
    assert os.listdir(tmp_path) == ["page.yml"]


def test_what_nobody_foresaw_is_one_line_too(tmp_path):
    program = (
        "import sys; from weightsmith import registry; from weightsmith.cli import main, methods\n"
        "def fails(room): raise KeyError('odd\\nkey')\n"
        "methods.cards = fails\n"
        "sys.argv = ['weightsmith', 'methods']; main.main()"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 1
    where = "(`weightsmith --debug ...` shows where)"
    assert answer.stderr == f"error: unexpected KeyError: 'odd\\nkey' {where}\n"


def test_methods_lists_the_registry_for_programs():
    listed = json.loads(weightsmith("methods", "--room", "merging", "--json").stdout)
    assert {"linear", "ties", "resm"} <= {card["id"] for card in listed}


def test_a_closed_pipe_ends_quietly(models):
    shell = f"set -o pipefail; {PROGRAM} methods | head -n 0"
    answer = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in answer.stderr


def test_completion_is_offered():
    # For the shell it is started from: `:` keeps bash from becoming the program itself.
    shell = ["bash", "-c", f"{PROGRAM} --show-completion; :"]
    answer = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert "complete" in answer.stdout.lower()


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """A run's folder with four states whose weights are their step."""
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 20, 30, 40):
        state = folder / f"checkpoint-{step}"
        state.mkdir()
        (state / "config.json").write_text(json.dumps({"model_type": "llama"}))
        weights = {"model.layers.0.w": np.full((4, 4), float(step), np.float32)}
        save_file(weights, state / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ((), 25.0),
        (("--last", "2"), 35.0),
        (("--every", "2"), 30.0),
        (("--method", "lawa", "--select", "3"), 30.0),
        (("--method", "ema", "--decay", "0.5"), 10 / 8 + 20 / 8 + 30 / 4 + 40 / 2),
    ],
)
def test_average_takes_the_states_of_a_runs_folder(states, tmp_path, options, mean):
    from safetensors.numpy import load_file

    done = weightsmith("average", states, tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.w"][0, 0] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "lawa", "--decay", "0.5"), "error: --decay: lawa has no such option"),
        (("--method", "lawa", "--select", "9"), "num_select must be in 1..4"),
        (("--method", "sewa", "--select", "2"), "held_out: sewa measures losses"),
    ],
)
def test_options_of_average_that_cannot_be_heeded_are_told(states, tmp_path, options, message):
    done = weightsmith("average", states, tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
