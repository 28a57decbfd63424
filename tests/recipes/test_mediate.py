"""The stage `mediate`: what a page may say, and a run from base to scores of the routed model."""

import json

import pytest
import torch

from weightsmith.errors import InputError, PageError
from weightsmith.evaluation import evaluate, prompts
from weightsmith.evaluation.models import load_model, load_tokenizer
from weightsmith.merging.mediator import Mediator, MediatorStore
from weightsmith.recipes import Inline, load_page, plan_run, run_recipe
from weightsmith.runs.seeds import derive

from .conftest import small_model

PAGE = """\
name: tiny
stages:
  base:
    train: &short {model: FOLDER/model, data: FOLDER/a.txt, sequence_length: 32, batch_size: 2, steps: 4}
  one: {finetune: {<<: *short, model: base, data: FOLDER/b.txt}}
  two: {finetune: {<<: *short, model: base}}
  mediated:
    mediate:
      base: base
      experts: [one, two]
      n_routed: 1
      router: {u_lo: 0.3}
      prompts: {one: FOLDER/b.txt, two: FOLDER/a.txt}
      prompts_per_task: 12
  scores: {evaluate: {models: [one, mediated], tasks: [FOLDER/a.txt, FOLDER/b.txt]}}
"""


@pytest.fixture
def page(tmp_path):
    small_model(tmp_path)
    for name, line in (
        ("a", "the quick brown fox jumps over the lazy dog\n"),
        ("b", "0123456789 98765432\n"),
    ):
        (tmp_path / f"{name}.txt").write_text(line * 60)

    def write(change=lambda text: text):
        file = tmp_path / "tiny.yaml"
        file.write_text(change(PAGE).replace("FOLDER", str(tmp_path)))
        return file

    return write


def test_a_mediated_model_is_made_routed_and_scored(page, tmp_path):
    run_recipe(page(), root=tmp_path, executor=Inline())
    folder = tmp_path / "tiny" / "stages" / "mediated" / "checkpoint"
    with MediatorStore.open(folder) as store:
        assert store.tasks == ("one", "two")
        assert len(store.plan.routed) == 1
        assert store.router is not None
    plan = json.loads((folder.parent / "plan.json").read_text())
    assert {block["decision"] for block in plan["blocks"]} == {"averaged", "routed"}
    scores = json.loads((tmp_path / "tiny/stages/scores/scores.json").read_text())["models"]["mediated"]
    # What the stage scored is what the router, left alone with each text's beginning, leads to.
    model, tokenizer = load_model(folder)
    assert isinstance(model, Mediator)
    again = evaluate(model, str(tmp_path / "b.txt"), tokenizer=tokenizer)["b"]
    assert again.value == pytest.approx(scores["b"]["value"], rel=1e-6)
    with model.using("one"):
        logits = model(input_ids=torch.tensor([[1, 5, 6]])).logits
    assert logits.shape[0] == 1


def test_the_seed_of_the_page_counts_from_nought_on(page, tmp_path):
    def seed(words):
        file = page(
            lambda text: text.replace("n_routed: 1", f"n_routed: 1\n      select: random\n      {words}")
        )
        run_recipe(file, root=tmp_path, executor=Inline())
        folder = tmp_path / "tiny" / "stages" / "mediated" / "checkpoint"
        return json.loads((folder / "weightsmith.json").read_text())["seed"]

    assert seed("seed: 0") == 0
    assert seed("") == derive(0, "mediated")


def test_scoring_lets_the_router_see_the_prompt_and_never_the_answer(page, tmp_path):
    run_recipe(page(), root=tmp_path, executor=Inline())
    model, tokenizer = load_model(tmp_path / "tiny/stages/mediated/checkpoint")
    seen = []
    decide = model._decide
    model._decide = lambda ids, mask: seen.append((ids, mask)) or decide(ids, mask)
    rows = tmp_path / "quiz.jsonl"
    rows.write_text(json.dumps({"q": "0123", "text": "456789"}) + "\n")
    from weightsmith.evaluation import TaskConfig

    evaluate(model, TaskConfig(task=str(rows), prompt="q"), tokenizer=tokenizer)
    ((ids, mask),) = seen
    assert int(mask.sum()) == 1 + 4
    assert tokenizer.decode(ids[0, 1:5]) == "0123"


def test_the_plan_of_a_run_knows_the_stage_beforehand(page, tmp_path):
    planned = plan_run(page(), root=tmp_path)
    stage = next(stage for stage in planned.stages if stage.stage == "mediated")
    assert stage.prediction.disk_bytes > 0
    assert not (tmp_path / "tiny" / "stages").exists()


@pytest.mark.parametrize(
    ("found", "changed", "said"),
    [
        ("n_routed: 1", "n_ruoted: 1", r"n_ruoted: no such key; did you mean `n_routed`"),
        ("experts: [one, two]", "experts: [one]", "experts: expected at least 2 fine-tunes, found 1"),
        ("u_lo: 0.3", "u_low: 0.3", "router.u_low: no such key"),
        ("u_lo: 0.3", "u_lo: 3.0", "u_lo: expected a number in"),
        ("{one: FOLDER/b.txt", "{three: docs, one: FOLDER/b.txt", "prompts.three: no expert of that name"),
        ("prompts_per_task: 12", "prompts_per_task: 4", "prompts_per_task: expected at least 8"),
        ("n_routed: 1", "average: tise", "average: no merge method `tise`"),
    ],
)
def test_a_page_that_is_wrong_says_where(page, found, changed, said):
    with pytest.raises(PageError, match=said):
        load_page(page(lambda text: text.replace(found, changed)))


def test_prompts_come_from_what_the_experts_were_trained_on(tmp_path):
    file = tmp_path / "page.yaml"
    file.write_text(
        "stages:\n"
        "  base: {train: {model: testbed/xs, data: [docs, names]}}\n"
        "  one: {finetune: {model: base, data: [add, reverse]}}\n"
        "  two: {finetune: {model: base, data: names}}\n"
        "  m: {mediate: {base: base, experts: {maths: one, names: two}}}\n"
    )
    config = load_page(file).stages["m"].config
    assert config.prompts == {"maths": ("add", "reverse"), "names": ("names",)}


def test_an_expert_of_unknown_training_needs_prompts(page, tmp_path):
    file = page(lambda text: text.replace("one: FOLDER/b.txt, ", ""))
    with pytest.raises(InputError, match="no stage above says what `one` was trained on"):
        plan_run(file, root=tmp_path)


def test_prompts_are_questions_and_pieces_of_texts_as_scoring_shows_them(page, tmp_path):
    page()
    tokenizer = load_tokenizer(tmp_path / "model")
    mixed = prompts(["add", "names"], tokenizer, 10, length=20)
    assert len(mixed) == 10
    assert all(ids[0] == tokenizer.bos_token_id for ids in mixed)
    questions = [tokenizer.decode(ids[1:]) for ids in mixed[::2]]
    assert all(text.startswith("A") and text.endswith("=") for text in questions)
    assert {len(ids) for ids in mixed[1::2]} == {10}
    with pytest.raises(InputError, match="is a function"):
        prompts("json:dumps", tokenizer, 4)
