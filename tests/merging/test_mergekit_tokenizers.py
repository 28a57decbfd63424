"""Tokenizer rules through mergekit: for every token, the row that mergekit gives it.

The numbers of appended tokens are each program's own, so rows are compared token by token; rows of padding
are not compared, because mergekit drops them (see the table on the page on merging).
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.vocabulary import read_vocabulary
from weightsmith.merging import merge

from .made import read, save
from .test_mergekit_parity import HIDDEN, PEER, RUN_PAGES, llama
from .test_vocabulary import BASE, M1, M2, tokenizer_files

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def pages(root):
    def page(tokenizer, method="linear", names=("base", "m1", "m2"), **more):
        entries = [
            {"model": str(root / name), "parameters": {"weight": w}}
            for name, w in zip(names, WEIGHTS[: len(names)], strict=True)
        ]
        return {
            "merge_method": method,
            "base_model": str(root / "base"),
            "models": entries,
            "dtype": "float32",
            **tokenizer,
            **more,
        }

    nested = {
        "source": "union",
        "tokens": {
            "x": {"source": str(root / "m2"), "force": True},
            "y": {"source": {"kind": "zero"}},
            "d": {"source": {"kind": "model_token", "model": str(root / "m1"), "token": "b"}},
            "new": {"source": {"kind": "model_token", "model": str(root / "m2"), "token_id": 1}},
        },
        "pad_to_multiple_of": 8,
    }
    return {
        "union": page({"tokenizer_source": "union"}),
        "base": page({"tokenizer_source": "base"}),
        "default": page({"tokenizer": {}}),
        "one_of_them": page({"tokenizer": {"source": str(root / "m1")}}),
        "path": page({"tokenizer_source": str(root / "m2")}),
        "deltas": page({"tokenizer": {"source": "union"}}, "task_arithmetic", ("m1", "m2")),
        "rules": page({"tokenizer": nested}),
        "no_base": {
            key: v for key, v in page({"tokenizer_source": str(root / "m1")}).items() if key != "base_model"
        },
    }


WEIGHTS = (0.5, 0.3, 0.4)


@pytest.fixture(scope="module")
def merged_by_mergekit(tmp_path_factory):
    if not PEER.exists():
        pytest.skip("mergekit is not installed in .venv-peers")
    root = tmp_path_factory.mktemp("tokenizers")
    for seed, (name, tokens, added) in enumerate(
        [("base", BASE, ()), ("m1", M1, ("<call>",)), ("m2", M2, ("<call>", "<end>"))]
    ):
        rows = len(tokens) + len(added)
        tensors = llama(seed)
        for key in (EMBED, HEAD):
            tensors[key] = tensors[key][:rows]
        config = {
            "hidden_size": HIDDEN,
            "intermediate_size": 48,
            "num_key_value_heads": 4,
            "vocab_size": rows,
            "torch_dtype": "float32",
        }
        side = tokenizer_files(tokens, added, tokenizer_class="PreTrainedTokenizerFast", unk_token=tokens[0])
        save(root / name, tensors, "F32", config, side)
    (root / "pages.json").write_text(json.dumps(pages(root)))
    done = subprocess.run(
        [PEER, "-c", RUN_PAGES, root / "pages.json", root / "theirs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


def tokens_of(folder):
    with Checkpoint.open(folder) as checkpoint:
        return read_vocabulary(checkpoint.side_file_map()).tokens


@pytest.mark.parametrize("name", pages(Path()))
def test_every_token_has_the_row_that_mergekit_gives_it(name, merged_by_mergekit, tmp_path):
    merge(pages(merged_by_mergekit)[name], tmp_path / "ours")
    peer = merged_by_mergekit / "theirs" / name
    ours, theirs = read(tmp_path / "ours"), read(peer)
    mine, other = tokens_of(tmp_path / "ours"), tokens_of(peer)
    assert set(mine) == set(other)
    for tensor, values in ours.items():
        if tensor in (EMBED, HEAD):
            rows = (
                [ours[tensor][mine[token]] for token in mine],
                [theirs[tensor][other[token]] for token in mine],
            )
            np.testing.assert_allclose(*rows, rtol=2e-5, atol=2e-6, err_msg=tensor)
        else:
            np.testing.assert_allclose(values, theirs[tensor], rtol=2e-5, atol=2e-6, err_msg=tensor)
