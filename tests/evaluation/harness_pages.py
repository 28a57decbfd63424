"""Pages of lm-evaluation-harness and their data, written on the spot."""

import json

COLOURS = ["red", "green", "dark blue", "a very light grey"]


def write_pages(folder, sums=()):
    """Tasks `colours` (choices; three splits), `shapes` (one split), `sums` (generated answers), `shots`,
    and the group `pictures` of the first two.

    Args:
        folder: Folder to make.
        sums: (question, answer) of `sums`.
    """
    folder.mkdir()
    for split, count in (("train", 12), ("validation", 9), ("test", 15)):
        rows = [
            {"question": f"{split} {n}?", "options": COLOURS[: 2 + n % 3], "right": n % 2}
            for n in range(count)
        ]
        _write(folder / f"colours-{split}.jsonl", rows)
    _write(
        folder / "shapes.jsonl",
        [{"question": f"shape {n}", "options": ["round", "a square"], "right": n % 2} for n in range(6)],
    )
    _write(
        folder / "sums.jsonl",
        [{"question": q, "answer": a} for q, a in sums] or [{"question": "", "answer": ""}],
    )
    splits = {split: str(folder / f"colours-{split}.jsonl") for split in ("train", "validation", "test")}
    choice = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: right
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
    colours = "training_split: train\nvalidation_split: validation\ntest_split: test\n" + choice
    _page(folder, "colours", splits, colours)
    _page(folder, "shots", splits, colours + "num_fewshot: 2\n")
    _page(folder, "shapes", {"test": str(folder / "shapes.jsonl")}, "test_split: test\n" + choice)
    (folder / "pictures.yaml").write_text("group: pictures\ntask: [colours, shapes]\n")
    generated = """
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first-letter, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
"""
    _page(folder, "sums", {"test": str(folder / "sums.jsonl")}, generated)
    return folder


def _write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _page(folder, name, files, rest):
    given = {"data_files": files, "cache_dir": str(folder.parent / "cache")}
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {json.dumps(given)}\n{rest}"
    )
