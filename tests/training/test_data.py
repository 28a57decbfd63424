"""Windows: a pure function of seed and index, nothing held out, labels where they belong."""

import json

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.testbed import alphabet, documents
from weightsmith.testbed.skills import pool
from weightsmith.training import DataSource
from weightsmith.training.data import (
    IGNORED,
    Mixture,
    PackedPairs,
    PackedText,
    SkillQuestions,
    mixture,
    sources,
)

EOS = alphabet.EOS


class Characters:
    """Stands for the bed's tokenizer."""

    eos_token_id = EOS

    def get_vocab(self):
        return alphabet.VOCABULARY

    def __call__(self, texts, **options):
        return {"input_ids": [alphabet.encode(text).tolist() for text in texts]}


class Words:
    """A tokenizer of another kind: one id per different word."""

    eos_token_id = 0

    def __init__(self):
        self.ids = {"<end>": 0}

    def get_vocab(self):
        return self.ids

    def __call__(self, texts, **options):
        known = self.ids
        return {
            "input_ids": [[known.setdefault(word, len(known)) for word in text.split()] for text in texts]
        }


def decoded(ids):
    return "".join("\0" if token == EOS else alphabet.CHARACTERS[token] for token in ids)


def examples(data, count=40, **options):
    settings = {"replayed": (), "replay": 0.0, "tokenizer": Characters(), "length": 64, "seed": 3, **options}
    return mixture(data, num_examples=count, **settings)


def test_an_example_depends_on_seed_and_index_alone():
    first, second = examples(["docs", "sort"]), examples(["docs", "sort"])
    backwards = [second[index] for index in reversed(range(40))][::-1]
    for one, other in zip((first[index] for index in range(40)), backwards, strict=True):
        assert np.array_equal(one["input_ids"], other["input_ids"])
        assert np.array_equal(one["labels"], other["labels"])
    other_seed = examples(["docs", "sort"], seed=4)
    assert any(not np.array_equal(first[i]["input_ids"], other_seed[i]["input_ids"]) for i in range(3))


def test_every_window_has_the_asked_length():
    made = examples(["docs", "names", "lookup", "add"])
    assert {(len(made[i]["input_ids"]), len(made[i]["labels"])) for i in range(40)} == {(64, 64)}


def test_one_pass_reads_every_window_once_and_the_next_pass_cuts_elsewhere():
    tokens = np.arange(1000)
    packed = PackedText(tokens, 64, seed=0)
    per_pass = (1000 - 32) // 64
    passes = [[packed.window(number * per_pass + i)[0] for i in range(per_pass)] for number in range(3)]
    for windows in passes:
        seen = np.concatenate(windows)
        assert len(set(seen.tolist())) == len(seen) == per_pass * 64
        assert all((np.diff(window) == 1).all() for window in windows)
    assert len({min(window[0] for window in windows) for windows in passes}) > 1
    assert [w[0] for w in passes[0]] != sorted(w[0] for w in passes[0])


def test_a_text_shorter_than_a_window_is_padded_and_the_padding_is_no_label():
    ids, labels = PackedText(np.arange(10), 16, seed=0).window(5)
    assert ids.tolist() == [*range(10), *[0] * 6]
    assert labels.tolist() == [*range(10), *[IGNORED] * 6]


def test_text_windows_come_from_training_documents_with_the_end_token_between_them():
    together = "\0".join(documents("docs", "train")) + "\0"
    made = examples("docs", count=60)
    for i in range(60):
        assert decoded(made[i]["input_ids"]) in together
        assert np.array_equal(made[i]["input_ids"], made[i]["labels"])


def test_only_answers_and_their_end_token_are_labels_of_skills():
    ids, labels = SkillQuestions(("add",), 64, seed=0).window(0)
    items = [part for part in decoded(ids).split("\0") if part]
    assert items
    wanted = "".join(item.partition("=")[2] + "\0" for item in items)
    assert decoded(token for token in labels if token != IGNORED) == wanted
    for place, label in enumerate(labels):
        assert label in (IGNORED, ids[place])


@pytest.mark.parametrize("skill", ["add", "lookup", "honest"])
def test_skills_never_show_a_held_out_question(skill):
    made = examples(skill, count=30)
    for i in range(30):
        for item in decoded(made[i]["input_ids"]).split("\0"):
            question = item[: item.index("=") + 1] if "=" in item else item[: item.find("?") + 2]
            assert not question or pool(question) > 1


def test_replay_takes_its_share_of_the_windows():
    made = examples("add", count=4000, replayed=["docs"], replay=0.25)
    share = np.mean([made.sources[made._choice[i]].__class__ is PackedText for i in range(4000)])
    assert share == pytest.approx(0.25, abs=0.02)


def test_weights_decide_the_share_of_each_source():
    made = examples([DataSource(source="docs", weight=3.0), DataSource(source="names")], count=4000)
    assert np.mean(made._choice == 0) == pytest.approx(0.75, abs=0.02)


def test_a_set_shares_the_weight_of_one_source():
    entries = sources([DataSource(source="strings", weight=2.0), "docs"])
    assert [(entry.source, entry.weight) for entry in entries] == [
        ("reverse", 1.0),
        ("sort", 1.0),
        ("docs", 1.0),
    ]


def test_sources_are_read_in_turn_so_that_no_window_is_skipped():
    class Counted:
        def window(self, index):
            seen.append(index)
            return np.zeros(1, np.int64), np.zeros(1, np.int64)

    seen = []
    made = Mixture([Counted()], [1.0], 5, 0)
    for i in range(5):
        made[i]
    assert seen == [0, 1, 2, 3, 4]


def test_files_are_tokenised_with_the_models_tokenizer(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"body": "a b c"}\n{"body": "a d"}\n')
    words = Words()
    made = examples(DataSource(source=str(file), column="body"), tokenizer=words, length=7, count=1)
    assert made[0]["input_ids"].tolist() == [
        words.ids[word] for word in ("a", "b", "c", "<end>", "a", "d", "<end>")
    ]


def test_prompts_are_no_labels_and_pairs_fill_a_window(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"q": f"q{i}", "a": f"a{i}"}) + "\n" for i in range(10)))
    made = examples(DataSource(source=str(file), prompt="q", column="a"), length=16, count=4)
    seen = set()
    for i in range(4):
        text = decoded(made[i]["input_ids"]).rstrip("\0").lstrip("\0")
        answers = decoded(token for token in made[i]["labels"] if token != IGNORED)
        assert answers == "".join(item[2:] + "\0" for item in text.split("\0"))
        seen |= set(text.split("\0"))
    assert seen == {f"q{i}a{i}" for i in range(10)}


def test_a_pair_longer_than_a_window_keeps_its_answer():
    packed = PackedPairs([(list(range(20)), [50, 51])], 8, eos=99, seed=0)
    ids, labels = packed.window(0)
    assert ids.tolist() == [99, 16, 17, 18, 19, 50, 51, 99]
    assert labels.tolist() == [IGNORED] * 5 + [50, 51, 99]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("soruce", "data `soruce`: neither a test-bed task.*did you mean `source`"),
        ("none.jsonl", r"none\.jsonl: no such file"),
        ([], "nothing to train on"),
        (DataSource(source="docs", weight=0.0), "weight must be positive"),
        (DataSource(source="empty.txt", prompt="q"), "a text file has none"),
    ],
)
def test_wrong_data_is_one_line(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match=message):
        sources(data)


def test_an_empty_file_and_a_missing_column_are_one_line(tmp_path):
    empty, other = tmp_path / "empty.txt", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text('{"body": "x"}\n')
    with pytest.raises(InputError, match=r"empty\.txt: there is nothing in it to read"):
        examples(str(empty))
    with pytest.raises(InputError, match=r"other\.jsonl:1: no column `text`; found body"):
        examples(str(other))


def test_skills_need_the_beds_tokenizer_and_documents_an_end_token(tmp_path):
    with pytest.raises(InputError, match="skills need a model with the test-bed's tokenizer"):
        examples("sort", tokenizer=Words())
    endless = Words()
    endless.eos_token_id = None
    with pytest.raises(InputError, match="no end token"):
        examples("docs", tokenizer=endless)


def test_the_fingerprint_of_a_file_is_that_of_its_bytes(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("one")
    first = DataSource(source=str(file)).fingerprint()
    file.write_text("two")
    assert DataSource(source=str(file)).fingerprint() != first
    file.write_text("one")
    assert DataSource(source=str(file)).fingerprint() == first


def test_a_hub_data_set_gives_its_texts_or_one_line(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"body": "one"}, {"body": ""}, {"body": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataSource(source="owner/name", column="body", subset="en", split="validation")
    assert list(data.texts()) == ["one", "two"]
    assert asked == [("owner/name", "en", "validation")]
    with pytest.raises(InputError, match="owner/name: no column `text`; found body"):
        list(DataSource(source="owner/name").texts())

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        InputError, match=r"owner/name \(split train\) can't be loaded: Couldn't reach .* Hub$"
    ):
        list(DataSource(source="owner/name").texts())
