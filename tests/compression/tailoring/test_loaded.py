"""Searches leave loaded models as they were, know them again, and find the decoder among other parts."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring.baselines import greedy
from weightsmith.compression.tailoring.pool import LayerPool
from weightsmith.compression.tailoring.scoring import Example, FunctionTask, TokenTask
from weightsmith.compression.tailoring.space import Configuration
from weightsmith.errors import InputError
from weightsmith.testbed import write_model_folder

from .made import TOKENS, Likelihood, family, gpt2, ids, llama, logits, near

SMALL = {"min_budget": 2, "max_budget": 12, "n_trials": 10, "sparsity": 0.25}


def numbers(model):
    return [layer.self_attn.layer_idx for layer in model.model.layers]


def said(model):
    with torch.inference_mode():
        return model.generate(ids(1, 6), max_new_tokens=8, do_sample=False).tolist()


def test_a_search_changes_nothing_in_loaded_models():
    base, candidates = family()
    models = [base, *candidates]
    candidates[0].train()
    before = [said(model.eval()) for model in models]
    candidates[0].train()
    TailorSearch(base, candidates, tasks=Likelihood(), **SMALL).run()
    assert [numbers(model) for model in models] == [[0, 1, 2, 3]] * 3
    assert [model.training for model in models] == [False, True, False]
    assert [said(model.eval()) for model in models] == before


def test_a_greedy_rule_changes_nothing_in_its_model():
    model = llama()
    before = said(model)
    greedy(model, [ids()], 2)
    assert numbers(model) == [0, 1, 2, 3]
    assert said(model) == before


@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "base recorded before"])
def test_hidden_states_are_those_of_the_layers_that_are_there(ran):
    base, candidates = family(depth=6)
    if ran:
        base(input_ids=ids(), output_hidden_states=True)
    pool = LayerPool(base, candidates)
    for dropped, source in (((1,), 0), ((2, 4), 1), ((), 2), ((1,), 0)):
        kept = {layer: (source,) if source else () for layer in range(6) if layer not in dropped}
        configuration = Configuration.of(6, dropped, kept)
        for model in (pool.assemble(configuration), pool.build(configuration)):
            states = model(input_ids=ids(), output_hidden_states=True, use_cache=False).hidden_states
            assert len(states) == len(configuration.layers) + 1
    assert len(base(input_ids=ids(), output_hidden_states=True).hidden_states) == 7


def test_a_function_may_read_a_layer_in_the_middle():
    def middle(model, indices):
        with torch.inference_mode():
            states = model(input_ids=ids(), output_hidden_states=True, use_cache=False).hidden_states
        return [float(states[2].abs().mean().clamp(max=1))] * len(indices)

    def scores(prefix_bytes):
        base, candidates = family()
        task = FunctionTask("middle", middle, 12)
        found = TailorSearch(base, candidates, tasks=task, prefix_cache_bytes=prefix_bytes, **SMALL)
        found.run()
        return [(trial.key, trial.status, trial.costs) for trial in found.trials]

    assert scores(1 << 20) == scores(0)
    assert {status for _, status, _ in scores(0)} == {"ok"}


def test_a_log_of_other_loaded_models_is_another_searchs(tmp_path):
    base, candidates = family()
    TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL).run()
    TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL).run()
    with pytest.raises(InputError, match="was made with models = "):
        TailorSearch(base, [near(base, 9), candidates[1]], tasks=Likelihood(), work=tmp_path, **SMALL).run()


def test_a_log_of_other_examples_is_another_searchs(tmp_path):
    def task(answer):
        examples = (Example((1, 5, row), ((answer,),)) for row in range(3, 15))
        return TokenTask("rows", "perplexity", tuple(examples))

    base, candidates = family()
    TailorSearch(base, candidates, tasks=task(7), work=tmp_path, **SMALL).run()
    with pytest.raises(InputError, match="was made with tasks = "):
        TailorSearch(base, candidates, tasks=task(8), work=tmp_path, **SMALL).run()


def test_a_log_of_another_precision_is_another_searchs(tmp_path):
    base, candidates = family("gpt2")
    TailorSearch(base, candidates, tasks=Likelihood(), work=tmp_path, **SMALL).run()
    short = [model.bfloat16() for model in (base, *candidates)]
    with pytest.raises(InputError, match="was made with"):
        TailorSearch(short[0], short[1:], tasks=Likelihood(), work=tmp_path, **SMALL).run()


def test_how_a_plan_is_chosen_is_checked_before_anything_is_scored():
    task = Likelihood()
    with pytest.raises(InputError, match="select: 'chebychev', expected mean, scaled_mean, chebyshev"):
        TailorSearch(gpt2(), tasks=task, select="chebychev", **SMALL)
    assert task.calls == []


def test_a_decoder_beside_a_tower_of_images_is_searched_and_written(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    words = {"vocab_size": TOKENS, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    config = Gemma3Config(
        text_config=sizes | words | {"initializer_range": 0.2},
        vision_config=sizes | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    base = Gemma3ForConditionalGeneration(config).eval()
    for name, model in (("base", base), ("one", near(base, 1))):
        write_model_folder("xs", tmp_path / name)  # its tokenizer
        model.save_pretrained(tmp_path / name)
    plan = TailorSearch(
        tmp_path / "base", [tmp_path / "one"], tasks=Likelihood(), device="cpu", **SMALL
    ).run()
    plan.save_pretrained(tmp_path / "out")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert made.config.text_config.num_hidden_layers == 3
    assert made.config.vision_config.num_hidden_layers == 4
    torch.testing.assert_close(logits(made), logits(plan.build()), rtol=0, atol=0)
