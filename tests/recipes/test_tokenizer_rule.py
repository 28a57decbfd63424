"""A tokenizer rule of a merge stage may name stages: it depends on them, and reads their folders."""

from pathlib import Path
from types import SimpleNamespace

from weightsmith.recipes.stages.merge import Merge

RULE = {
    "source": "code",
    "tokens": {
        "<a>": {"source": "names"},
        "<b>": {"source": {"kind": "model_token", "model": "code", "token": "x"}},
    },
    "pad_to_multiple_of": 64,
}


def test_stages_that_a_tokenizer_rule_names_are_read_from_their_folders():
    body = {"method": "linear", "base": "base", "models": ["base", "code"], "tokenizer": RULE}
    stage, problems = Merge.parse(body)
    assert not problems
    assert [reference.value for reference in stage.references()] == [
        "base",
        "base",
        "code",
        "code",
        "names",
        "code",
    ]
    folders = {name: Path("/runs") / name for name in ("base", "code", "names")}
    located = stage._located(folders, {}, SimpleNamespace(seed=0))
    assert located["tokenizer"] == {
        "source": "/runs/code",
        "tokens": {
            "<a>": {"source": "/runs/names"},
            "<b>": {"source": {"kind": "model_token", "model": "/runs/code", "token": "x"}},
        },
        "pad_to_multiple_of": 64,
    }
    stage, _ = Merge.parse({**body, "tokenizer": "union"})
    assert stage._located(folders, {}, SimpleNamespace(seed=0))["tokenizer"] == "union"
