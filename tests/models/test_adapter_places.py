"""An adapter stands wherever a page names a model: each page merges adapters and what peft expands them to.

The reference merges the folders that `merge_and_unload` makes, so only the place of the adapter differs.
"""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.utils import logging as transformers_logging

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import CheckpointError
from weightsmith.evaluation import evaluate
from weightsmith.merging import measure, merge

transformers_logging.disable_progress_bar()

TEXT = "<unk> <s> </s> the cat sat on a mat and dog ran home to see its old house in town"
WORDS = TEXT.split()
ADDED = ["<|call|>", "<|done|>"]


def tokenizer(words):
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama(**options):
    return LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=24, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        **options,
    )  # fmt: skip


def tuned(model, folder, seed, auto=AutoModelForCausalLM, tokens=None, task="CAUSAL_LM", **options):
    """An adapter on `model` saved in `folder`, and what peft makes of it in `full-...` beside it."""
    words = AutoTokenizer.from_pretrained(model)
    below = auto.from_pretrained(model)
    if tokens:
        words.add_special_tokens({"additional_special_tokens": tokens})
        below.resize_token_embeddings(30, mean_resizing=False)
    made = get_peft_model(below, LoraConfig(task_type=task, r=4, lora_alpha=8, **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
            elif tokens and ("embed_tokens" in name or "lm_head" in name):
                parameter += 0.01 * torch.randn_like(parameter)
    made.save_pretrained(folder)
    if tokens:
        words.save_pretrained(folder)
    fresh = auto.from_pretrained(model)
    if tokens:
        fresh.resize_token_embeddings(30, mean_resizing=False)
    whole = PeftModel.from_pretrained(fresh, folder).merge_and_unload()
    full = folder.with_name(f"full-{folder.name}")
    whole.save_pretrained(full)
    words.save_pretrained(full)


@pytest.fixture(scope="module", params=["tied", "untied"])
def family(request, tmp_path_factory):
    """`base`, adapters `a` and `b` on it, and `c` that brings tokens and embeddings of its own."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama(tie_word_embeddings=request.param == "tied"))
    model.save_pretrained(root / "base")
    tokenizer(WORDS).save_pretrained(root / "base")
    (root / "full-base").symlink_to(root / "base")
    tuned(root / "base", root / "a", 1, target_modules=["q_proj", "v_proj", "down_proj"])
    tuned(root / "base", root / "b", 2, target_modules=["k_proj", "up_proj"])
    tuned(root / "base", root / "c", 3, tokens=ADDED, target_modules=["q_proj"])
    return root


def same_models(found, wanted, auto=AutoModelForCausalLM):
    """Both folders load and hold the same weights, settings and tokens."""
    one, two = (auto.from_pretrained(folder) for folder in (found, wanted))
    assert one.config.to_dict() | {"_name_or_path": ""} == two.config.to_dict() | {"_name_or_path": ""}
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=3e-6, msg=lambda m, n=name: f"{n}: {m}")
    if (wanted / "tokenizer.json").exists():
        assert (
            AutoTokenizer.from_pretrained(found).get_vocab()
            == AutoTokenizer.from_pretrained(wanted).get_vocab()
        )
    with Checkpoint.open(found) as made, Checkpoint.open(wanted) as other:
        assert made.tensors.keys() == other.tensors.keys()


def kit(method, **page):
    return {"merge_method": method, **page}


PLACES = {
    "base": lambda at: {"method": "ties", "base": at("a"), "models": [at("b"), at("base")], "density": 0.5},
    "base with its own base named": lambda at: {
        "method": "task_arithmetic", "base": at("base+a"), "models": [at("b"), at("base+b")], "weight": 0.3
    },
    "base of whole matrices": lambda at: {"method": "tsvm", "base": at("a"), "models": [at("b"), at("base")]},
    "one alone": lambda at: {"method": "passthrough", "models": [at("a")]},
    "one with tokens of its own": lambda at: {"method": "passthrough", "models": [at("c")]},
    "two with tokens of their own": lambda at: {"method": "linear", "models": [at("c"), at("base+c")]},
    "base_model": lambda at: kit(
        "dare_ties", base_model=at("a"), models=[{"model": at("b"), "parameters": {"weight": 1.0}}]
    ),
    "slices": lambda at: kit(
        "passthrough",
        slices=[
            {"sources": [{"model": at("a"), "layer_range": [0, 2]}]},
            {"sources": [{"model": at("base+b"), "layer_range": [1, 3]}]},
        ],
    ),
    "slices of a blend": lambda at: kit(
        "slerp",
        base_model=at("a"),
        slices=[{"sources": [{"model": at(name), "layer_range": [0, 3]} for name in "ab"]}],
        parameters={"t": [0.2, 0.8]},
    ),
    "slices with a base of their own": lambda at: kit(
        "task_arithmetic",
        base_model=at("base"),
        slices=[
            {"sources": [{"model": at("b"), "layer_range": [0, 1]}], "base_model": at("a")},
            {"sources": [{"model": at("a"), "layer_range": [1, 3]}]},
        ],
    ),
    "modules": lambda at: kit(
        "linear", modules={"default": {"models": [{"model": at("a")}, {"model": at("b")}]}}
    ),
    "union of tokens": lambda at: {
        "method": "task_arithmetic", "base": at("base"), "models": [at("a"), at("c")], "tokenizer": "union"
    },
    "union of tokens, whole matrices": lambda at: {
        "method": "iso_c", "base": at("base"), "models": [at("a"), at("c")], "tokenizer": "union"
    },
    "the base's tokens": lambda at: {
        "method": "linear", "base": at("base"), "models": [at("c"), at("b")], "tokenizer": "base"
    },
    "an adapter's tokens": lambda at: {
        "method": "linear", "models": [at("a"), at("c")], "tokenizer": at("c")
    },
    "a token of an adapter": lambda at: {
        "method": "linear", "models": [at("a"), at("c")],
        "tokenizer": {"source": "union", "tokens": {"<|call|>": {"source": at("c"), "force": True}}},
    },
    "base with tokens of its own": lambda at: {
        "method": "task_arithmetic", "base": at("c"), "models": [at("a")], "tokenizer": "base"
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_is_the_model_that_peft_makes_of_it(family, tmp_path, place):
    def named(words):
        return "+".join(str(family / part) for part in words.split("+"))

    def expanded(words):
        return str(family / f"full-{words.rpartition('+')[2]}")

    merge(PLACES[place](named), tmp_path / "found")
    merge(PLACES[place](expanded), tmp_path / "wanted")
    same_models(tmp_path / "found", tmp_path / "wanted")


def test_mergekits_lora_key_names_an_adapter_of_the_base(family, tmp_path):
    reference = {"model": {"path": str(family / "base")}, "lora": {"path": str(family / "a")}}
    page = kit("task_arithmetic", models=[{"model": str(family / "b"), "parameters": {"weight": 0.5}}])
    merge(page | {"base_model": reference}, tmp_path / "found")
    page["models"][0]["model"] = str(family / "full-b")
    merge(page | {"base_model": str(family / "full-a")}, tmp_path / "wanted")
    same_models(tmp_path / "found", tmp_path / "wanted")


def test_an_adapter_on_an_adapter_is_what_peft_makes_of_one_after_the_other(family, tmp_path):
    stacked = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family / "full-a"), family / "b")
    stacked.merge_and_unload().save_pretrained(tmp_path / "wanted")
    tokenizer(WORDS).save_pretrained(tmp_path / "wanted")
    words = "+".join(str(family / name) for name in ("base", "a", "b"))
    merge({"method": "passthrough", "models": [words]}, tmp_path / "found")
    same_models(tmp_path / "found", tmp_path / "wanted")


def test_an_adapter_made_on_an_adapter_stands_on_it_where_the_page_has_that_one_as_base(family, tmp_path):
    (tmp_path / "d").mkdir()
    for file in (family / "b").iterdir():
        (tmp_path / "d" / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(family / "a")
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(settings))
    page = {"method": "linear", "base": str(family / "a"), "models": [str(tmp_path / "d")]}
    merge(page, tmp_path / "found")
    words = "+".join(str(family / name) for name in ("base", "a", "b"))
    merge({"method": "passthrough", "models": [words]}, tmp_path / "wanted")
    same_models(tmp_path / "found", tmp_path / "wanted")


def test_parts_of_an_encoder_and_decoder_take_adapters(tmp_path):
    torch.manual_seed(0)
    config = T5Config(
        d_model=16, d_kv=4, d_ff=24, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=24,
        decoder_start_token_id=0,
    )  # fmt: skip
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer(WORDS).save_pretrained(tmp_path / "base")
    for seed, name in enumerate("ab"):
        tuned(
            tmp_path / "base", tmp_path / name, seed, AutoModelForSeq2SeqLM, task="SEQ_2_SEQ_LM",
            target_modules=["q", "v", "wo"],
        )  # fmt: skip

    def page(at):
        return kit(
            "task_arithmetic",
            base_model=at("base"),
            modules={
                "encoder": {"models": [{"model": at("a")}]},
                "decoder": {"models": [{"model": at("b"), "parameters": {"weight": 0.5}}]},
                "shared": {"models": [{"model": at("a")}]},
            },
        )

    merge(page(lambda name: str(tmp_path / name)), tmp_path / "found")
    full = {"base": "base", "a": "full-a", "b": "full-b"}
    merge(page(lambda name: str(tmp_path / full[name])), tmp_path / "wanted")
    same_models(tmp_path / "found", tmp_path / "wanted", AutoModelForSeq2SeqLM)


def batches():
    rng = np.random.default_rng(5)
    ids = [torch.from_numpy(rng.integers(3, 20, (1, 12))) for _ in range(2)]
    return [{"input_ids": one, "labels": one.clone()} for one in ids]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_of_adapters_are_those_of_the_expanded_models(family, tmp_path, method):
    def page(names):
        models = []
        for name in names:
            source = "+".join(str(family / part) for part in name.split("+"))
            statistics = tmp_path / f"stats-{name}"
            measure(source, batches(), statistics)
            models.append({"model": source, "statistics": str(statistics)})
        return {"method": method, "models": models}

    merge(page(["a", "base+b"]), tmp_path / "found")
    merge(page(["full-a", "full-b"]), tmp_path / "wanted")
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("found", "wanted"))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, two.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_an_adapter_is_scored_as_the_model_it_stands_for(family, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the cat sat on a mat and the dog ran home")
    for name, full in (("a", "full-a"), ("c", "full-c")):
        found = evaluate(str(family / name), str(file), length=16)["text"].value
        wanted = evaluate(str(family / full), str(file), length=16)["text"].value
        assert found == pytest.approx(wanted, abs=1e-5)
    both = evaluate(f"{family / 'base'}+{family / 'a'}", str(file), length=16)["text"].value
    assert both == evaluate(str(family / "a"), str(file), length=16)["text"].value


@pytest.mark.parametrize("family", ["untied"], indirect=True)
def test_an_adapter_with_rows_of_its_own_for_one_of_two_embeddings_is_refused(family, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "half").mkdir()
    for file in (family / "c").iterdir():
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "half" / "adapter_model.safetensors")
    heads = [name for name in weights if "lm_head" in name]
    for name in heads:
        weights.pop(name)
    save_file(weights, tmp_path / "half" / "adapter_model.safetensors")
    page = {"method": "passthrough", "models": [str(tmp_path / "half")]}
    with pytest.raises(CheckpointError, match=r"leaves `lm_head\.weight` with 24 rows and gives `.*` 30"):
        merge(page, tmp_path / "out")


def test_what_stands_behind_a_plus_must_be_an_adapter(family, tmp_path):
    words = f"{family / 'base'}+{family / 'full-a'}"
    for page in ({"base": words, "models": [str(family / "a")]}, {"models": [words]}):
        with pytest.raises(
            CheckpointError, match="full-a is a whole model, expected an adapter behind the `\\+`"
        ):
            merge({"method": "linear", **page}, tmp_path / "out")
    with pytest.raises(CheckpointError, match="full-a is a whole model"):
        Checkpoint.open(words)
