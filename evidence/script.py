"""What the evidence scripts share: their options, what they have done already, where their results go."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.runs.atomic import read_json, write_json, write_text

RESULTS = Path(__file__).parent / "results"


def parser_of(
    doc: str | None, quick: str, seeds: Sequence[int] = (0, 1, 2), *, resumes: bool = False
) -> argparse.ArgumentParser:
    """`--quick`, `--seeds`, `--out`, and `--work` for a script that `resumes`.

    Args:
        doc: The script's docstring, its help.
        quick: What `--quick` does.
        seeds: Those of the committed results.
        resumes: It keeps what it has done, in `units`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument(
        "--out", type=Path, help=f"folder for the results (default {RESULTS}; none with --quick)"
    )
    if resumes:
        parser.add_argument("--work", type=Path, help="folder of what is done: a stopped run goes on from it")
    return parser


class Units:
    """What a run has done, a JSON file for each part, so that a stopped run goes on with what is missing.

    Attributes:
        folder: Where the files lie, and whatever else parts leave for others.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def place(self, name: str) -> Path:
        """File or folder of its own for `name`."""
        return self.folder / name.replace(" ", "-").replace(",", "").replace("/", "-")

    def __call__(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` gives, and the `seconds` it took; read where it was made before."""
        file = self.place(f"{name}.json")
        if not file.exists():
            begun = time.perf_counter()
            write_json(file, {**make(), "seconds": round(time.perf_counter() - begun, 1)})
            print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        return read_json(file)


@contextlib.contextmanager
def units(name: str, chosen: argparse.Namespace, facts: Any) -> Iterator[Units]:
    """The parts of a script, kept by `facts`: all that decides a result besides the name of its part.

    They lie in `--work`, or in runs/evidence-NAME-work, with `--quick` in a folder that goes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=4).hexdigest()
        usual = Path(scratch) if chosen.quick else Path("runs") / f"evidence-{name}-work"
        yield Units((chosen.work or usual) / key)


def publish(
    name: str, chosen: argparse.Namespace, results: Mapping[str, Any], words: str, drawing: str | None = None
) -> None:
    """Print the table, and write `name`.json, .md and .svg where the options say so."""
    out = chosen.out or (None if chosen.quick else RESULTS)
    if out:
        write_json(out / f"{name}.json", results)
        write_text(out / f"{name}.md", words)
        if drawing is not None:
            write_text(out / f"{name}.svg", drawing)
    print(words)
