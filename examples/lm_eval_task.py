"""A task of your own for lm-evaluation-harness, a score on it, and a search by it. Offline.

    pip install "weightsmith[hf,eval]"
    python examples/lm_eval_task.py

A page and two files of questions are written into a temporary folder. The model is a small random one, so its
score is a guess; put your own models in its place.
"""

import json
import logging
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weightsmith.compression import TailorSearch
from weightsmith.evaluation import evaluate
from weightsmith.testbed import model_config, write_model_folder

PAGE = """\
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}
  cache_dir: {folder}/cache
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: right
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_page(folder: Path) -> None:
    things = ["grass", "the sky", "blood", "snow", "coal", "a lemon", "a brick", "ink"]
    for split in ("validation", "test"):
        rows = [
            {"question": f"In the {split}, {thing} is ", "options": ["green", "blue"], "right": place % 2}
            for place, thing in enumerate(things)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colours.yaml").write_text(PAGE.format(folder=folder))


def main() -> None:
    logging.getLogger("weightsmith").setLevel(logging.ERROR)
    folder = Path(tempfile.mkdtemp())
    write_page(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**model_config("xs"))).eval()
    tokenizer = AutoTokenizer.from_pretrained(write_model_folder("xs", folder / "model"))
    task = f"lm_eval:{folder}/colours@acc"

    plan = TailorSearch(
        model, tasks=task, tokenizer=tokenizer, sparsity=0.25, n_trials=8, min_budget=2, max_budget=8
    ).run()
    print(f"dropped {plan.configuration.dropped}; on calibration {1 - plan.costs['colours']:.2f}")
    for name, scored in (("all layers", model), ("smaller", plan.build())):
        score = evaluate(scored, task, tokenizer=tokenizer)["colours"]
        print(f"{name}: {score.metric} {score.value:.2f} on {score.n} test questions")


if __name__ == "__main__":
    main()
