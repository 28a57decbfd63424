"""Models with different tokens come to one vocabulary: every row is where its token is."""

import json
import subprocess
import sys

import numpy as np
import pytest

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.vocabulary import read_vocabulary
from weightsmith.errors import CheckpointError, PageError
from weightsmith.merging import merge, merge_state_dicts, plan_merge

from .made import page, random_model, read, save

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BASE = ["<s>", "</s>", "a", "b", "c", "d"]
M1 = ["<s>", "b", "a", "</s>", "x", "d", "c", "y"]
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
M2 = ["</s>", "c", "<s>", "x", "a", "b"]  # no `d`


def tokenizer_files(tokens, added=(), **roles):
    """A word-level tokenizer.json and its tokenizer_config.json; `added` follow the tokens."""
    entries = [
        {**PLAIN, "id": len(tokens) + at, "content": token, "special": True} for at, token in enumerate(added)
    ]
    vocabulary = {token: at for at, token in enumerate(tokens)}
    page = {
        "version": "1.0",
        "added_tokens": entries,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": tokens[0]},
    }
    config = {"tokenizer_class": "TokenizersBackend", **roles}
    return {
        "tokenizer.json": json.dumps(page).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def made(root, name, seed, tokens, rows, near=None, added=(), tied=False, config=None, **roles):
    tensors = random_model(seed, vocabulary=rows)
    if tied:
        del tensors[HEAD]
    config = {"vocab_size": rows, "tie_word_embeddings": tied, **(config or {})}
    save(root / name, tensors, "F32", config, tokenizer_files(tokens, added, **roles))
    return tensors


@pytest.fixture
def three(tmp_path):
    """base (8 rows for 6 tokens), m1 (8 tokens in 8 rows), m2 (6 tokens in 7 rows)."""
    return tmp_path, {
        "base": (made(tmp_path, "base", 0, BASE, 8), BASE),
        "m1": (made(tmp_path, "m1", 1, M1, 8), M1),
        "m2": (made(tmp_path, "m2", 2, M2, 7), M2),
    }


def by_rule(models, tokens, rows, name):
    """Every model's rows in the output's order, by the rule, token by token: a slow reference in float64."""

    def row(model, token):
        values, known = models[model]
        return values[name][known.index(token)].astype(np.float64)

    found = {}
    for model, (_, known) in models.items():
        lines = []
        for number in range(rows):
            token = tokens[number] if number < len(tokens) else None
            if token is None:
                for owner in (model, "base"):  # padding: one's own, else the base's, else its mean
                    table, own = models[owner][0][name], models[owner][1]
                    if len(own) <= number < len(table):
                        lines.append(table[number].astype(np.float64))
                        break
                else:
                    lines.append(models["base"][0][name][: len(models["base"][1])].astype(np.float64).mean(0))
            elif token in known:
                lines.append(row(model, token))
            elif token in models["base"][1]:
                lines.append(row("base", token))
            else:
                owners = [other for other, (_, theirs) in models.items() if token in theirs]
                lines.append(np.mean([row(other, token) for other in owners], axis=0))
        found[model] = np.stack(lines)
    return found


@pytest.mark.parametrize(
    ("rule", "tokens", "rows"),
    [
        ("base", BASE, 8),
        ("union", [*BASE, "x", "y"], 8),
        ({"source": "union", "pad_to_multiple_of": 12}, [*BASE, "x", "y"], 12),
        ({"source": "m1"}, M1, 8),
    ],
)
def test_every_row_is_that_of_its_token(three, rule, tokens, rows, tmp_path):
    root, models = three
    if isinstance(rule, dict) and rule["source"] == "m1":
        rule = {"source": str(root / "m1")}
    merge(page(root, "task_arithmetic", ("m1", "m2"), weight=[0.5, 0.25], tokenizer=rule), root / "out")
    out = read(root / "out")
    for name in (EMBED, HEAD):
        aligned = by_rule(models, tokens, rows, name)
        wanted = aligned["base"]
        wanted = wanted + 0.5 * (aligned["m1"] - wanted) + 0.25 * (aligned["m2"] - wanted)
        np.testing.assert_allclose(out[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
    config = json.loads((root / "out" / "config.json").read_text())
    assert config["vocab_size"] == rows
    with Checkpoint.open(root / "out") as found:
        assert read_vocabulary(found.side_file_map()).tokens == {t: at for at, t in enumerate(tokens)}


def test_a_token_of_several_owners_takes_their_mean_and_the_base_need_not_be_among_them(three):
    root, models = three
    models = {name: models[name] for name in ("m1", "m2")}
    config = {"method": "linear", "models": [str(root / "m1"), str(root / "m2")], "weight": [3.0, 1.0]}
    third = made(root, "m3", 3, ["<s>", "d"], 2)
    models["m3"] = (third, ["<s>", "d"])
    config["models"].append(str(root / "m3"))
    config["weight"].append(4.0)
    merge({**config, "tokenizer": "base"}, root / "out")  # the first model's tokens: there is no base
    out = read(root / "out")[EMBED]
    c1, c2 = (models[m][0][EMBED][models[m][1].index("c")].astype(np.float64) for m in ("m1", "m2"))
    np.testing.assert_allclose(out[M1.index("c")], (3 * c1 + c2 + 4 * (c1 + c2) / 2) / 8, rtol=1e-5)
    d1, d3 = models["m1"][0][EMBED][M1.index("d")], third[EMBED][1]
    np.testing.assert_allclose(out[M1.index("d")], (3 * d1 + (d1 + d3) / 2 + 4 * d3) / 8, rtol=1e-5)
    y1 = models["m1"][0][EMBED][M1.index("y")]
    np.testing.assert_allclose(out[M1.index("y")], y1, rtol=1e-5)  # its only owner's, for all


def test_equal_tokens_and_other_padding_need_no_rule_and_keep_the_bases_rows(tmp_path):
    base = made(tmp_path, "base", 0, BASE, 8)
    one = made(tmp_path, "m1", 1, BASE, 6)
    two = made(tmp_path, "m2", 2, BASE, 7)
    report = merge(page(tmp_path, "task_arithmetic", ("m1", "m2")), tmp_path / "out")
    out = read(tmp_path / "out")[EMBED]
    np.testing.assert_allclose(out[:6], (one[EMBED] + two[EMBED][:6]) - base[EMBED][:6], atol=1e-6)
    np.testing.assert_allclose(out[6], two[EMBED][6], atol=1e-7)
    np.testing.assert_array_equal(out[7], base[EMBED][7])
    assert report.warnings == (
        "vocabulary of m1: 6 rows, the output has 8",
        "vocabulary of m2: 7 rows, the output has 8",
    )


def test_a_change_is_a_warning_part_of_the_report_and_of_the_lineage(three):
    root, _ = three
    report = merge(page(root, "task_arithmetic", ("m1", "m2"), tokenizer="union"), root / "out")
    assert report.warnings == (
        "vocabulary: 8 tokens in 8 rows, base has 6 in 8; 2 tokens ('x', 'y') added",
        "vocabulary of m1: 4 moved to other rows",
        "vocabulary of m2: 2 tokens ('d', 'y') not its own; 6 moved to other rows; 7 rows, the output has 8",
    )
    wanted = {
        "source": "union",
        "tokens": 8,
        "rows": 8,
        "added": ["x", "y"],
        "num_added": 2,
        "num_dropped": 0,
        "models": {
            "base": {"rows": 8, "moved": 0, "missing": 2, "dropped": 0},
            "m1": {"rows": 8, "moved": 4, "missing": 0, "dropped": 0},
            "m2": {"rows": 7, "moved": 6, "missing": 2, "dropped": 0},
        },
    }
    assert report.summary()["vocabulary"] == wanted
    lineage = json.loads((root / "out" / "weightsmith.json").read_text())
    assert lineage["parameters"]["vocabulary"] == wanted


def test_equal_vocabularies_change_nothing(tmp_path):
    for seed, name in enumerate(("base", "m1")):
        made(tmp_path, name, seed, BASE, 8)
    plain = page(tmp_path, "task_arithmetic", ("m1",))
    merge(plain, tmp_path / "plain")
    for rule in ("base", "union"):
        report = merge({**plain, "tokenizer": rule}, tmp_path / f"by {rule}")
        assert report.warnings == ()
        assert report.vocabulary is None
        for name, values in read(tmp_path / "plain").items():
            np.testing.assert_array_equal(read(tmp_path / f"by {rule}")[name], values)


@pytest.mark.parametrize("tied", [False, True])
def test_neither_tiles_nor_workers_change_a_bit(tmp_path, tied, monkeypatch):
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(300)]
    for seed, name in enumerate(("base", "m1", "m2")):
        made(tmp_path, name, seed, list(rng.permutation(words)[: 250 + 10 * seed]), 290, tied=tied)
    config = page(tmp_path, "ties", ("m1", "m2"), density=0.5, trim_scope="tensor", tokenizer="union")
    merge(config, tmp_path / "one", threads=1)
    monkeypatch.setattr("weightsmith.merging.aligned.BLOCK", 64)
    with plan_merge(config, threads=1) as plan:
        whole = read(tmp_path / "one")
        for output in plan.outputs:
            parameter = output.parameter({}, tile_elements=48)
            pieces = [tile.models.copy() for tile in parameter.tiles()]
            base, models = parameter.whole()
            np.testing.assert_array_equal(np.hstack(pieces), models.reshape(2, -1))
            if output.spec.name == EMBED:
                assert base.shape == (300, 16)
                some = plan.outputs[0].models[0].checkpoint.read(EMBED, 37, 99)
                np.testing.assert_array_equal(some, models[0].reshape(-1)[37:99])
        assert (HEAD in whole) is not tied
    merge(config, tmp_path / "two", threads=3)
    for name, values in whole.items():
        np.testing.assert_array_equal(values, read(tmp_path / "two")[name])


def test_rules_of_single_tokens_choose_rows(three):
    root, models = three
    m1, m2 = str(root / "m1"), str(root / "m2")
    rule = {
        "source": "union",
        "tokens": {
            "x": {"source": m2},  # m1 and m2 have it: only the base takes this row
            "y": {"source": {"kind": "zero"}},
            "d": {"source": {"kind": "model_token", "model": m1, "token": "x"}, "force": True},
            "new": {"source": {"kind": "model_token", "model": m2, "token_id": 1}},
            "a": {"force": True},
            "nobody's": None,
        },
    }
    config = {"method": "linear", "models": [str(root / name) for name in models], "tokenizer": rule}
    report = merge({**config, "base": str(root / "base")}, root / "out")
    with Checkpoint.open(root / "out") as out:
        ids = read_vocabulary(out.side_file_map()).tokens
    out = read(root / "out")[EMBED]

    def row(model, token):
        return models[model][0][EMBED][models[model][1].index(token)]

    np.testing.assert_allclose(out[ids["x"]], (2 * row("m2", "x") + row("m1", "x")) / 3, rtol=1e-5)
    np.testing.assert_allclose(out[ids["y"]], row("m1", "y") / 3, rtol=1e-5)
    np.testing.assert_allclose(out[ids["d"]], row("m1", "x"), rtol=1e-5)
    np.testing.assert_allclose(out[ids["new"]], models["m2"][0][EMBED][1], rtol=1e-5)
    np.testing.assert_allclose(out[ids["a"]], row("base", "a"), rtol=1e-5)
    np.testing.assert_array_equal(out[ids["nobody's"]], 0)
    assert '1 token ("nobody\'s") in no model: rows of zeros' in report.warnings


def test_numbers_of_tokens_in_the_configs_follow_their_tokens(tmp_path):
    config = {
        "bos_token_id": 0,
        "eos_token_id": [1, 2],
        "pad_token_id": 4,
        "text_config": {"image_token_index": 5, "vocab_size": 8, "num_hidden_layers": 2},
        "is_encoder_decoder": False,
    }
    made(tmp_path, "base", 0, BASE, 8, config=config)
    made(
        tmp_path,
        "m1",
        1,
        ["<s>", "b", "a", "</s>", "x", "d"],
        6,
        pad_token={"content": "x"},
        eos_token="</s>",
    )
    generation = {"eos_token_id": 1, "suppress_tokens": [3, 4], "temperature": 0.5, "use_cache": True}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    rule = {"tokenizer": str(tmp_path / "m1")}
    merge(page(tmp_path, "task_arithmetic", ("m1",)) | rule, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (found["bos_token_id"], found["eos_token_id"], found["pad_token_id"]) == (0, [3, 2], 4)
    assert found["text_config"] == {"image_token_index": 5, "vocab_size": 6, "num_hidden_layers": 2}
    assert found["vocab_size"] == 6
    assert found["is_encoder_decoder"] is False
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"eos_token_id": 3, "suppress_tokens": [1], "temperature": 0.5, "use_cache": True}


def test_a_tokenizer_of_no_model_of_the_merge_can_be_taken(three):
    root, models = three
    tokens = ["b", "<s>", "new", "a"]
    made(root, "elsewhere", 9, tokens, 4)
    for file in (root / "elsewhere").glob("model*"):
        file.unlink()
    report = merge(page(root, "linear", ("base", "m2"), tokenizer=str(root / "elsewhere")), root / "out")
    out = read(root / "out")[EMBED]
    rows = [
        (models["base"][0][EMBED][BASE.index(t)], models["m2"][0][EMBED][M2.index(t)]) for t in ("b", "a")
    ]
    np.testing.assert_allclose(out[[0, 3]], [(one + two) / 2 for one, two in rows], rtol=1e-5)
    assert out.shape == (4, 16)
    np.testing.assert_array_equal(out[2], 0)
    assert report.vocabulary["source"] == "elsewhere"


def test_a_model_without_a_tokenizer_is_taken_for_one_with_the_bases(three):
    root, models = three
    for file in (root / "m2").glob("tokenizer*"):
        file.unlink()
    report = merge(page(root, "linear", ("base", "m2"), tokenizer="union"), root / "out")
    assert "m2 has no tokenizer; taken for that of base" in report.warnings
    out, base, m2 = read(root / "out")[EMBED], models["base"][0][EMBED], models["m2"][0][EMBED]
    np.testing.assert_allclose(out[:7], (base[:7] + m2) / 2, rtol=1e-5)
    np.testing.assert_array_equal(out[7], base[7])


def test_the_chat_template_comes_with_the_tokenizer(three):
    root, _ = three
    (root / "base" / "chat_template.jinja").write_text("{{ 'base' }}")
    (root / "m1" / "chat_template.jinja").write_text("{{ 'm1' }}")
    for rule, said in (("union", "base"), (str(root / "m1"), "m1")):
        with plan_merge(page(root, "linear", ("base", "m1"), tokenizer=rule)) as plan:
            assert plan.side_files["chat_template.jinja"].read_text() == f"{{{{ '{said}' }}}}"


def test_files_that_would_contradict_the_new_tokenizer_are_left_out(three):
    root, _ = three
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "special_tokens_map.json"):
        (root / "base" / name).write_text("{}")
    with plan_merge(page(root, "linear", ("base", "m1"), tokenizer="union")) as plan:
        assert set(plan.side_files) == {
            "config.json",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }


BAD_RULES = [
    ("m9", r"tokenizer: .*m9: no such folder"),
    ({"source": "m9"}, r"tokenizer.source: .*m9: no such folder"),
    ({"sauce": "union"}, r"tokenizer.sauce: no such key; did you mean `source`"),
    (
        {"source": "union", "pad_to_multiple_of": 0},
        r"tokenizer.pad_to_multiple_of: expected a whole number from 1",
    ),
    ({"tokens": ["a"]}, r"tokenizer.tokens: expected a mapping of tokens"),
    ({"tokens": {"a": {"from": 1}}}, r"tokenizer.tokens.a.from: no such key"),
    ({"tokens": {"a": {"force": 1}}}, r"tokenizer.tokens.a.force: expected true or false, found 1"),
    (
        {"tokens": {"a": {"source": {"kind": "one"}}}},
        r"source.kind: expected model_token or zero, found 'one'",
    ),
    (
        {"tokens": {"a": {"source": {"kind": "model_token", "model": "m1"}}}},
        r"expected either `token` or `token_id`",
    ),
    ({"tokens": {"a": {"source": "m9"}}}, r"tokenizer.tokens.a.source: `.*m9` is no model of this merge"),
    ({"tokens": {"new": {"source": "m1"}}}, r"tokenizer.tokens.new.source: m1 has no token 'new'"),
    (
        {"tokens": {"a": {"source": {"kind": "model_token", "model": "m1", "token_id": 8}}}},
        r"tokenizer.tokens.a.source.token_id: m1 has 8 rows, 8 is asked for",
    ),
]


def located(value, root):
    """Names of models as paths."""
    if isinstance(value, dict):
        return {key: located(inner, root) for key, inner in value.items()}
    return f"{root}/{value}" if value in ("m1", "m9") else value


@pytest.mark.parametrize(("rule", "message"), BAD_RULES)
def test_a_wrong_rule_is_told_by_its_key(three, rule, message):
    root, _ = three
    with pytest.raises(PageError, match=message):
        plan_merge(page(root, "linear", ("base", "m1"), tokenizer=located(rule, root)))


def test_what_a_tokenizer_lacks_is_told(three):
    root, _ = three
    config = page(root, "linear", ("base", "m1"))
    with pytest.raises(
        CheckpointError, match=r"Set `tokenizer: base` to take base's for all, or `tokenizer: union`"
    ):
        plan_merge(config)
    (root / "base" / "tokenizer.json").rename(root / "base" / "tekken.json")
    with pytest.raises(
        CheckpointError, match=r"^base: its tokenizer \(tekken.json\) can't be read token by token"
    ):
        plan_merge({**config, "tokenizer": "union"})
    (root / "base" / "tekken.json").unlink()
    with pytest.raises(
        PageError, match=r"^tokenizer: base has no tokenizer whose tokens the output could have"
    ):
        plan_merge({**config, "tokenizer": "union"})
    vocabulary = {token: number for number, token in enumerate(BASE)}
    (root / "base" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(CheckpointError, match=r"^base: has no tokenizer.json to append tokens to; make one"):
        plan_merge({**config, "tokenizer": "union"})
    merge({**config, "tokenizer": "base"}, root / "out")  # reading the vocabulary is enough here
    assert read(root / "out")[EMBED].shape == (8, 16)


def test_tensors_over_tokens_that_differ_in_rows_are_refused(three):
    root, _ = three
    tensors = random_model(5, vocabulary=9)
    tensors[HEAD] = tensors[HEAD][:7]
    save(root / "odd", tensors, "F32", side=tokenizer_files(M2))
    with pytest.raises(CheckpointError, match=r"^odd: its tensors over tokens differ in rows \(lm_head"):
        plan_merge(page(root, "linear", ("base", "odd"), tokenizer="base"))


def test_an_architecture_of_unknown_names_is_known_by_its_vocab_size(tmp_path):
    rng = np.random.default_rng(0)
    for name, tokens, rows in (("base", BASE, 6), ("m1", M1, 8)):
        tensors = {
            "dictionary.table": rng.standard_normal((rows, 4), np.float32),
            "places.position_table": rng.standard_normal((6, 4), np.float32),
            "layers.0.mix.weight": rng.standard_normal((4, 4), np.float32),
        }
        save(
            tmp_path / name,
            tensors,
            "F32",
            {"vocab_size": rows, "model_type": "own"},
            tokenizer_files(tokens),
        )
    merge(page(tmp_path, "linear", ("base", "m1"), tokenizer="union"), tmp_path / "out")
    assert read(tmp_path / "out")["dictionary.table"].shape == (8, 4)
    assert read(tmp_path / "out")["places.position_table"].shape == (6, 4)


def test_passthrough_with_other_rows_is_not_a_plain_copy(three):
    root, models = three
    merge(
        page(root, "passthrough", ("m1",)) | {"base": str(root / "base"), "tokenizer": "base"}, root / "out"
    )
    out, m1 = read(root / "out"), models["m1"][0]
    for number, token in enumerate(BASE):
        np.testing.assert_array_equal(out[EMBED][number], m1[EMBED][M1.index(token)])


def test_merges_of_bpe_models_are_joined_the_bases_first(tmp_path):
    def bpe(folder, merges, seed):
        letters = ["a", "b", "c"]
        tokens = letters + ["".join(pair.split()) for pair in merges]
        page = {
            "version": "1.0",
            "added_tokens": [{**PLAIN, "id": len(tokens), "content": "<end>", "special": True}],
            "model": {"type": "BPE", "vocab": {t: n for n, t in enumerate(tokens)}, "merges": merges},
        }
        side = {"tokenizer.json": json.dumps(page).encode()}
        save(folder, random_model(seed, vocabulary=8), "F32", {"vocab_size": 8}, side)

    bpe(tmp_path / "base", ["a b", "ab c"], 0)
    bpe(tmp_path / "m1", ["b c", "a b"], 1)
    with plan_merge(page(tmp_path, "linear", ("base", "m1"), tokenizer="union")) as plan:
        found = json.loads(plan.side_files["tokenizer.json"])
    assert found["model"]["merges"] == ["a b", "ab c", "b c"]
    assert found["model"]["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "<end>": 5, "bc": 6}
    tokenizers = pytest.importorskip("tokenizers")
    encoder = tokenizers.Tokenizer.from_str(json.dumps(found))
    assert encoder.encode("abcbc<end>").tokens == ["abc", "bc", "<end>"]
    assert encoder.get_vocab()["<end>"] == 5


def test_a_sentencepiece_model_and_a_list_of_words_are_read_without_a_library(tmp_path):
    def piece(text):
        inner = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15\x00\x00\x00\x00\x18\x03"
        return b"\x0a" + bytes([len(inner)]) + inner

    (tmp_path / "tokenizer.model").write_bytes(
        b"".join(map(piece, ["<unk>", "▁the", "é"])) + b"\x12\x02\x08\x01"
    )
    found = read_vocabulary({"tokenizer.model": tmp_path / "tokenizer.model"})
    assert found.tokens == {"<unk>": 0, "▁the": 1, "é": 2}
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not a sentencepiece model"):
        read_vocabulary({"tokenizer.model": tmp_path / "tokenizer.model"})
    (tmp_path / "vocab.txt").write_text("[PAD]\nthe\n")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"2": {"content": "<x>", "special": True}}, "pad_token": "[PAD]"})
    )
    files = {name: tmp_path / name for name in ("vocab.txt", "tokenizer_config.json")}
    found = read_vocabulary(files)
    assert found.tokens == {"[PAD]": 0, "the": 1, "<x>": 2}
    assert found.roles == {"pad_token": "[PAD]"}


def test_a_union_imports_neither_torch_nor_a_tokenizer_library(three):
    root, _ = three
    config = page(root, "task_arithmetic", ("m1", "m2"), tokenizer="union")
    code = (
        "import sys, json; from weightsmith.merging import merge; "
        f"merge(json.loads({json.dumps(config)!r}), {str(root / 'out')!r}); "
        "print([name for name in ('torch', 'tokenizers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def measured(root, name, seed):
    """Statistics of a model, as `weightsmith stats` would write them, with random values."""
    rng = np.random.default_rng(seed)
    found = {}
    for tensor, values in read(root / name).items():
        found[f"fisher.{tensor}"] = rng.random(values.shape).astype(np.float32)
        if values.ndim == 2 and "embed" not in tensor:
            inputs = rng.standard_normal((values.shape[1], values.shape[1])).astype(np.float32)
            found[f"gram.{tensor}"] = inputs @ inputs.T
    with Checkpoint.open(root / name) as checkpoint:
        facts = {"format": 1, "kinds": ["fisher", "gram"], "fingerprint": checkpoint.fingerprint()}
    folder = save(root / f"stats-{name}", found, "F32", side={"statistics.json": json.dumps(facts).encode()})
    return {"model": str(root / name), "statistics": str(folder)}, found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rule", "tokens", "rows"),
    [("base", BASE, 8), ("union", [*BASE, "x", "y"], 8), ("union of two", None, 7)],
)
def test_fisher_information_moves_with_its_rows_and_says_nothing_of_tokens_a_model_lacks(
    tmp_path, rule, tokens, rows, tied
):
    models = {
        "base": (made(tmp_path, "base", 0, BASE, 8, tied=tied), BASE),
        "m1": (made(tmp_path, "m1", 1, M1, 8, tied=tied), M1),
        "m2": (made(tmp_path, "m2", 2, M2, 7, tied=tied), M2),
    }
    options = {"base": str(tmp_path / "base")}
    if rule == "union of two":  # without a base: the first model's tokens, then the other's
        options, tokens = {}, [*M2, *(token for token in M1 if token not in M2)]
        models = {"m2": models["m2"], "m1": models["m1"]}
        rows = len(tokens)
    else:
        models = {"m1": models["m1"], "m2": models["m2"]}
    entries, information = zip(
        *(measured(tmp_path, name, 7 + at) for at, name in enumerate(models)), strict=True
    )
    page = {"method": "fisher", "models": list(entries), "tokenizer": rule.split()[0], **options}
    merge(page, tmp_path / "out")
    merge({"method": "linear", "models": [entry["model"] for entry in entries], **options,
           "tokenizer": page["tokenizer"]}, tmp_path / "mean")  # fmt: skip
    out, mean = read(tmp_path / "out"), read(tmp_path / "mean")
    for name in (EMBED,) if tied else (EMBED, HEAD):
        for number, token in enumerate(tokens):
            above = below = 0.0
            for (values, known), facts in zip(models.values(), information, strict=True):
                if token in known:
                    share = facts[f"fisher.{name}"][known.index(token)].astype(np.float64)
                    above, below = above + share * values[name][known.index(token)], below + share
            wanted = above / below if np.any(below) else mean[name][number]
            np.testing.assert_allclose(out[name][number], wanted, rtol=1e-5, atol=1e-7)
        assert out[name].shape[0] >= rows
    norm = "model.norm.weight"
    shares = [facts[f"fisher.{norm}"].astype(np.float64) for facts in information]
    wanted = sum(s * v[norm] for s, (v, _) in zip(shares, models.values(), strict=True)) / sum(shares)
    np.testing.assert_allclose(out[norm], wanted, rtol=1e-5)


def test_gram_matrices_hold_whatever_the_order_of_tokens(three):
    root, models = three
    entries, information = zip(
        *(measured(root, name, 7 + at) for at, name in enumerate(("m1", "m2"))), strict=True
    )
    tokens = [*BASE, "x", "y"]
    merge(
        {"method": "regmean", "base": str(root / "base"), "models": list(entries), "tokenizer": "union"},
        root / "out",
    )
    aligned = {name: by_rule(models, tokens, 8, name) for name in (EMBED, HEAD)}
    states = [
        {
            name: np.float32(aligned[name][model]) if name in aligned else values
            for name, values in models[model][0].items()
        }
        for model in ("m1", "m2")
    ]
    grams = [
        {name.removeprefix("gram."): value for name, value in facts.items() if name.startswith("gram.")}
        for facts in information
    ]
    wanted = merge_state_dicts(None, states, "regmean", statistics=grams)
    for name, values in read(root / "out").items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-4, atol=1e-6)
