"""A mediated model answers as the models it was made of, whatever the architecture, mode and batch."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging as hf_logging

from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging.mediator import (
    Mediator,
    MediatorConfig,
    RouterConfig,
    build_mediator,
    plan_mediator,
)
from weightsmith.testbed import model_files

hf_logging.set_verbosity_error()

VOCABULARY = 40
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL, intermediate_size=24, mlp_bias=True, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SMALL, intermediate_size=24, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=None,
    ),
    "mixtral": lambda: MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, intermediate_size=24, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2
    ),
}
TASKS = ("math", "code", "law")
PROMPTS = {
    task: [[1, 3 + n % 9 + 10 * k, 4 + 10 * k, 3 + 10 * k] for n in range(12)] for k, task in enumerate(TASKS)
}


def make_family(root, kind, spread=0.3):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.15)
    base.save_pretrained(root / "base")
    for task in TASKS:
        tuned = AutoModelForCausalLM.from_pretrained(root / "base")
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(spread * parameter.std() * torch.randn_like(parameter))
        tuned.save_pretrained(root / task)
    return root


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_family(tmp_path_factory.mktemp("only_llama"), "llama")


def experts(root):
    return {task: root / task for task in TASKS}


def built(root, out, routed=None, **options):
    plan = None
    if routed is not None:
        plan = plan_mediator(root / "base", experts(root))
        plan = plan.with_routed([block.block for block in plan.blocks][:routed])
    build_mediator(root / "base", experts(root), out, MediatorConfig(**options), plan=plan)
    return out


@pytest.fixture(scope="module")
def mediated(family, tmp_path_factory):
    """Two of three blocks routed, at a density of 0.3."""
    return built(family, tmp_path_factory.mktemp("mediated") / "m", routed=2, expert_density=0.3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, VOCABULARY, (4, 7), generator=generator)


def logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(input_ids=ids, **kwargs).logits


def close(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mode", ["delta", "materialize"])
def test_each_expert_answers_as_its_exported_checkpoint(mediated, batch, mode, tmp_path):
    m = Mediator.from_pretrained(mediated, mode=mode)
    for task in TASKS:
        plain = AutoModelForCausalLM.from_pretrained(m.export_merged(task, tmp_path / task)).eval()
        close(logits(m, batch, task_id=task), logits(plain, batch))
    weights = {"math": 0.3, "law": 0.9}
    plain = AutoModelForCausalLM.from_pretrained(m.export_merged(weights, tmp_path / "mix")).eval()
    close(logits(m, batch, weights=weights), logits(plain, batch))


@pytest.mark.parametrize("mode", ["delta", "materialize"])
def test_all_blocks_in_full_are_the_experts_and_evenly_the_average(family, batch, mode, tmp_path):
    """Embedding, final norm and head are averaged, so those of the comparison are too."""
    m = Mediator.from_pretrained(built(family, tmp_path / "m", routed=3, expert_density=1.0), mode=mode)
    tuned = {task: AutoModelForCausalLM.from_pretrained(family / task).eval() for task in TASKS}
    states = {task: model.state_dict() for task, model in tuned.items()}
    mean = {name: sum(state[name] for state in states.values()) / 3 for name in states["math"]}
    for task, model in tuned.items():
        outside = {
            name: value for name, value in mean.items() if not any(part.isdigit() for part in name.split("."))
        }
        model.load_state_dict({**states[task], **outside})
        close(logits(m, batch, task_id=task), logits(model, batch))
    tuned["math"].load_state_dict(mean)
    close(logits(m, batch, weights=dict.fromkeys(TASKS, 1 / 3)), logits(tuned["math"], batch))


def test_without_routed_blocks_every_mix_is_the_average(family, batch, tmp_path):
    m = Mediator.from_pretrained(built(family, tmp_path / "m", n_routed=0))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    for given in ("law", {"math": 0.7, "code": 0.1}):
        close(logits(m, batch, task_id=given), logits(plain, batch), 0)


def test_both_modes_agree_for_any_mix(mediated, batch):
    delta, merged = (Mediator.from_pretrained(mediated, mode=mode) for mode in ("delta", "materialize"))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        mix = [dict(zip(TASKS, torch.rand(3, generator=generator).tolist(), strict=True)) for _ in batch]
        close(logits(delta, batch, weights=mix), logits(merged, batch, weights=mix))
        close(logits(delta, batch, weights=mix[0]), logits(merged, batch, weights=mix[0]))


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (4, 3), (4, 40)])
def test_few_rows_and_many_rows_go_through_the_same_weights(mediated, shape):
    delta, merged = (Mediator.from_pretrained(mediated, mode=mode) for mode in ("delta", "materialize"))
    ids = torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(2))
    soft, none = {"math": 0.2, "code": 0.5, "law": 0.3}, dict.fromkeys(TASKS, 0.0)
    for given in (soft, {"law": 1.0}, none, [soft, {"law": 1.0}, none, soft][: len(ids)]):
        close(logits(delta, ids, weights=given), logits(merged, ids, weights=given))


def test_the_dense_part_has_the_same_gradient_by_few_rows_and_by_many(llama, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=2, expert_density=0.3))
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(2))
    gradients = []
    for rows in (ids[:, :6], ids):
        for given in ("law", ["law", "math"]):
            m.model.zero_grad()
            m(input_ids=rows, task_id=given).logits[:, :6].sum().backward()
            gradients.append([p.grad.clone() for p in m.model.parameters()])
    for one, other in zip(gradients[:2], gradients[2:], strict=True):
        for few, many in zip(one, other, strict=True):
            close(few, many, 1e-4)


@pytest.mark.parametrize("mode", ["delta", "materialize"])
def test_a_batch_of_several_tasks_answers_each_row_as_if_alone(mediated, batch, mode):
    m = Mediator.from_pretrained(mediated, mode=mode)
    given = ["law", {"math": 0.5, "code": 0.5}, "code", {}]
    given[3] = dict.fromkeys(TASKS, 0.0)
    together = logits(m, batch, task_id=given)
    for row, entry in enumerate(given):
        close(together[row : row + 1], logits(m, batch[row : row + 1], task_id=entry))


def test_long_batches_take_another_route_and_give_the_same(mediated):
    m = Mediator.from_pretrained(mediated)
    ids = torch.randint(2, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(2))
    whole = logits(m, ids, task_id="code")
    for row in range(4):
        close(whole[row : row + 1, :10], logits(m, ids[row : row + 1, :10], task_id="code"))


def test_generation_with_a_cache_is_generation_without(mediated, batch):
    m = Mediator.from_pretrained(mediated)
    tasks = ["law", "code", "math", "law"]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(batch)}
    cached = m.generate(batch, task_id=tasks, **options)
    plain = m.generate(batch, task_id=tasks, use_cache=False, **options)
    assert cached.shape == (4, 13)
    torch.testing.assert_close(cached, plain)
    for row, task in enumerate(tasks):
        options["attention_mask"] = torch.ones(1, 7, dtype=torch.long)
        alone = m.generate(batch[row : row + 1], task_id=task, **options)
        torch.testing.assert_close(alone, cached[row : row + 1])


def test_beams_and_several_answers_keep_to_their_prompts_experts(llama, batch, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=3))
    options = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    mask = torch.ones_like(batch)
    tasks = ["law", "code", "math", "law"]
    together = m.generate(batch, task_id=tasks, attention_mask=mask, **options)
    for row, task in enumerate(tasks):
        alone = m.generate(batch[row : row + 1], task_id=task, attention_mask=mask[:1], **options)
        torch.testing.assert_close(alone, together[2 * row : 2 * row + 2])


@pytest.mark.parametrize("feature", ["hidden", "last_token", "embedding"])
def test_the_router_finds_the_task_of_a_prompt(mediated, feature, tmp_path):
    m = Mediator.from_pretrained(mediated)
    m.fit_router(PROMPTS, config=RouterConfig(feature=feature, ood_quantile=1.0))
    for task, prompts in PROMPTS.items():
        assert {decision.task for decision in m.route(prompts)} == {task}
    again = Mediator.from_pretrained(m.save_pretrained(tmp_path / "saved"))
    every = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    assert again.route(every) == m.route(every)
    ids = torch.tensor(every)
    close(logits(again, ids), logits(m, ids), 0)
    assert m.counts[TASKS[0], "single"] > 0


def test_a_prompt_is_routed_alike_alone_and_in_a_padded_batch(mediated):
    m = Mediator.from_pretrained(mediated)
    m.fit_router(PROMPTS)
    short, long = PROMPTS["code"][0], PROMPTS["law"][1] + PROMPTS["law"][2][1:]
    left = torch.tensor([[0] * (len(long) - len(short)) + short, long])
    mask = torch.tensor([[0] * (len(long) - len(short)) + [1] * len(short), [1] * len(long)])
    features = m._features(left, mask, m.router.config)
    for row, prompt in enumerate((short, long)):
        alone = m._features(*m._padded([prompt]), m.router.config)
        torch.testing.assert_close(
            torch.from_numpy(features[row]), torch.from_numpy(alone[0]), atol=1e-5, rtol=1e-5
        )


def test_the_router_looks_at_the_dense_model_whatever_was_served_before(llama, tmp_path):
    for mode in ("delta", "materialize"):
        m = Mediator.from_pretrained(built(llama, tmp_path / mode, routed=3, expert_density=1.0), mode=mode)
        ids, mask = m._padded(PROMPTS["math"])
        before = m._features(ids, mask, RouterConfig())
        logits(m, ids, task_id="law")
        assert (m._features(ids, mask, RouterConfig()) == before).all()


def test_one_decision_is_taken_at_prefill_and_kept(llama, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=2))
    m.fit_router(PROMPTS)
    ids = torch.tensor([PROMPTS["code"][0], PROMPTS["law"][0]])
    mask = torch.ones_like(ids)
    made, decisions = m.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, return_routing=True
    )
    assert [decision.task for decision in decisions] == ["code", "law"]
    assert sum(m.counts.values()) == 2
    # The wrapped model routes too, on its own: this is what the Trainer and pipelines call.
    own = m.model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    torch.testing.assert_close(own, made)
    assert sum(m.counts.values()) == 4
    assert m.decisions == decisions


def test_inside_using_every_pass_has_the_same_experts(llama, batch, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=2))
    with m.using("code"):
        inside = logits(m.model, batch)
    close(inside, logits(m, batch, task_id="code"), 0)


def test_text_is_routed_by_its_letters(llama, tmp_path):
    for name, content in model_files("xs").items():
        if name.startswith(("tokenizer", "special")):
            for folder in ("base", *TASKS):
                (llama / folder / name).write_text(content)
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=1))
    assert isinstance(m.tokenizer, PreTrainedTokenizerFast)
    texts = {task: [f"{task} question {n}" for n in range(20)] for task in TASKS}
    m.fit_router(texts, config=RouterConfig(feature="text", ood_quantile=1.0))
    assert [decision.task for decision in m.route(["math question 21", "law question 5"])] == ["math", "law"]
    m.save_router()
    assert Mediator.from_pretrained(tmp_path / "m").route("code question 3")[0].task == "code"


def test_an_expert_comes_and_goes(llama, batch, tmp_path):
    two = {task: llama / task for task in ("math", "code")}
    build_mediator(llama / "base", two, tmp_path / "m", MediatorConfig(n_routed=2))
    m = Mediator.from_pretrained(tmp_path / "m")
    m.fit_router({task: PROMPTS[task] for task in two})
    before = logits(m, batch, task_id="code")
    decisions = m.route(PROMPTS["code"])
    m.add_expert("law", llama / "law")
    assert m.tasks == ("math", "code", "law")
    assert all(len(decision.weights) == 3 for decision in m.route(PROMPTS["code"]))
    with_law = logits(m, batch, task_id="law")
    fresh = Mediator.from_pretrained(m.save_pretrained(tmp_path / "three"))
    close(logits(fresh, batch, task_id="law"), with_law)
    m.remove_expert("law", llama / "law")
    close(logits(m, batch, task_id="code"), before)
    after = m.route(PROMPTS["code"])
    assert [decision.weights for decision in after] == [decision.weights for decision in decisions]
    m.remove_expert("code")
    assert {decision.task for decision in m.route(PROMPTS["code"])} == {"math"}


def test_nothing_is_answered_without_a_router_or_a_task(llama, batch, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=1))
    for ask in (lambda: m.generate(batch), lambda: logits(m, batch), lambda: m.route([1, 2])):
        with pytest.raises(RuntimeError, match=r"call fit_router\(prompts\), or say .* task_id"):
            ask()
    with pytest.raises(InputError, match="no task `lwa`; did you mean `law`"):
        m.generate(batch, task_id="lwa")
    with pytest.raises(InputError, match="2 tasks for 4 sequences"):
        m.generate(batch, task_id=["law", "code"])
    with pytest.raises(InputError, match="task `law` has no prompts"):
        m.fit_router({task: PROMPTS[task] for task in ("math", "code")})
    with pytest.raises(InputError, match="no task `poetry`"):
        m.fit_router({**PROMPTS, "poetry": [[1]]})
    with pytest.raises(InputError, match="layer 9, the model has 3 blocks"):
        m.fit_router(PROMPTS, config=RouterConfig(layer=9))
    with pytest.raises(InputError, match="mode: expected materialize or delta"):
        Mediator.from_pretrained(tmp_path / "m", mode="fast")
    with pytest.raises(CheckpointError, match="choose another folder"):
        m.save_pretrained(tmp_path / "m")


def test_a_prompt_without_tokens_is_answered_by_all(llama, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=1))
    m.fit_router(PROMPTS)
    (decision,) = m._decide(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.long))
    assert decision.branch == "ood"
    assert decision.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))


def test_merged_parameters_are_kept_for_the_last_mixes(llama, batch, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=2), mode="materialize", cache_size=2)
    for task, switches in (("law", 1), ("code", 2), ("law", 2), ("math", 3), ("law", 3), ("code", 4)):
        logits(m, batch, task_id=task)
        assert m.serving.switches == switches, task


def test_a_closed_model_is_the_plain_one_again(llama, batch, tmp_path):
    m = Mediator.from_pretrained(built(llama, tmp_path / "m", routed=2))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    logits(m, batch, task_id="law")
    model = m.model
    m.close()
    close(logits(model, batch), logits(plain, batch), 0)


@pytest.mark.parametrize("mode", ["delta", "materialize"])
def test_bfloat16_serves_what_float32_does_within_its_places(llama, batch, mode, tmp_path):
    built(llama, tmp_path / "m", routed=3)
    exact = Mediator.from_pretrained(tmp_path / "m", mode=mode)
    coarse = Mediator.from_pretrained(tmp_path / "m", mode=mode)
    coarse.to(torch.bfloat16)
    given = ["law", "code", {"law": 0.5, "math": 0.5}, "math"]
    close(logits(coarse, batch, task_id=given).float(), logits(exact, batch, task_id=given), 0.1)
