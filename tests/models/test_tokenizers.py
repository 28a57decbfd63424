"""Models with tokenizers of their own: the merged folder, loaded with Auto classes, computes what it should.

The reference permutes the embeddings of every model in memory, token by token, and averages the models; both
read the same prompts, made of tokens that all models have.
"""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from weightsmith.merging import merge

transformers_logging.disable_progress_bar()

COMMON = "the cat sat on a mat and the dog ran"
TEXTS = {
    "base": f"{COMMON} home to see its old house in the town",
    "m1": f"a horse stood by the river {COMMON} zebra yak quail",
    "m2": f"{COMMON} far over seven hills",
}
SPECIAL = {"base": [], "m1": ["<|call|>"], "m2": ["<|call|>", "<|pad|>"]}


def words(name):
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *TEXTS[name].split()])
    if name == "m2":  # every number is another one
        vocabulary = dict(reversed(vocabulary.items()))
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def pieces(name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXTS[name]] * 3, trainer)
    return tokenizer


def unigrams(name):
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)], unk_id=0, byte_fallback=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([TEXTS[name]] * 3, trainer)
    return tokenizer


def made(folder, kind, tied, padding):
    """base, m1, m2 with tokenizers of one kind; returns their state dicts and tokenizers."""
    found = {}
    for seed, name in enumerate(TEXTS):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=kind(name), unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[name]])
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(tokenizer) + padding,
            tie_word_embeddings=tied,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found[name] = model.state_dict(), tokenizer
    return found


def in_memory(found, names, out, rows):
    """The mean of the models, every embedding permuted to the output's numbers, one token at a time."""
    vocabularies = {name: tokenizer.get_vocab() for name, (_, tokenizer) in found.items()}
    permuted = {name: dict(state) for name, (state, _) in found.items()}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        for name in names:
            table = torch.zeros(rows, 16)
            for token, number in out.get_vocab().items():
                owners = [name] if token in vocabularies[name] else ["base"]
                if token not in vocabularies[owners[0]]:
                    owners = [other for other in names if token in vocabularies[other]]
                given = [found[owner][0][key][vocabularies[owner][token]] for owner in owners]
                table[number] = torch.stack(given).mean(0)
            permuted[name][key] = table
    return {key: torch.stack([permuted[name][key] for name in names]).mean(0) for key in permuted["base"]}


@pytest.mark.parametrize("kind", [words, pieces, unigrams])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["union", "base"])
def test_the_merged_model_gives_the_logits_of_permuted_embeddings(kind, tied, source, tmp_path):
    padding = 3 if kind is words else 0
    found = made(tmp_path, kind, tied, padding)
    page = {
        "method": "linear",
        "base": str(tmp_path / "base"),
        "models": [str(tmp_path / name) for name in TEXTS],
        "tokenizer": source,
    }
    report = merge(page, tmp_path / "out")
    assert any(warning.startswith("vocabulary") for warning in report.warnings)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    base = found["base"][1]
    assert {token: tokenizer.get_vocab()[token] for token in base.get_vocab()} == base.get_vocab()
    every = set().union(*(tokens.get_vocab() for _, tokens in found.values()))
    assert set(tokenizer.get_vocab()) == (every if source == "union" else set(base.get_vocab()))
    assert model.config.eos_token_id == tokenizer.eos_token_id == base.eos_token_id
    rows = model.config.vocab_size
    assert rows == model.get_input_embeddings().weight.shape[0] >= len(tokenizer)

    wanted = AutoModelForCausalLM.from_config(model.config).eval()
    wanted.load_state_dict(in_memory(found, TEXTS, tokenizer, rows))
    inputs = torch.tensor([[1, *tokenizer(COMMON)["input_ids"]]])
    assert tokenizer.unk_token_id not in inputs[0, 1:]
    tokens = len(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(
            model(inputs).logits[..., :tokens], wanted(inputs).logits[..., :tokens], atol=1e-5, rtol=1e-4
        )

    if source == "union":  # a token that only others have is one token, with their row
        numbers = tokenizer("the <|call|> cat", add_special_tokens=False)["input_ids"]
        call = tokenizer.convert_tokens_to_ids("<|call|>")
        assert numbers.count(call) == 1
        assert tokenizer.decode(numbers, skip_special_tokens=True).split() == ["the", "cat"]
        rows_of = [found[n][0]["model.embed_tokens.weight"] for n in ("m1", "m2")]
        given = [
            t[found[n][1].convert_tokens_to_ids("<|call|>")]
            for t, n in zip(rows_of, ("m1", "m2"), strict=True)
        ]
        mean = (given[0] + given[1] + (given[0] + given[1]) / 2) / 3
        torch.testing.assert_close(model.get_input_embeddings().weight[call], mean, atol=1e-6, rtol=1e-5)


def test_words_of_other_models_become_words_of_the_union(tmp_path):
    made(tmp_path, words, False, 0)
    page = {"method": "linear", "models": [str(tmp_path / name) for name in TEXTS], "tokenizer": "union"}
    merge(page, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.tokenize("the zebra ran far") == ["the", "zebra", "ran", "far"]
    assert tokenizer.tokenize("thezebra") == ["<unk>"]


def test_text_of_the_base_is_cut_as_before_by_a_union_of_byte_pairs(tmp_path):
    found = made(tmp_path, pieces, False, 0)
    page = {"method": "linear", "models": [str(tmp_path / name) for name in TEXTS], "tokenizer": "union"}
    merge(page, tmp_path / "out")
    tokenizer, base = AutoTokenizer.from_pretrained(tmp_path / "out"), found["base"][1]
    assert tokenizer(TEXTS["base"])["input_ids"] == base(TEXTS["base"])["input_ids"]
    assert len(tokenizer.tokenize("zebra quail")) < len(base.tokenize("zebra quail"))
    assert tokenizer.decode(tokenizer("zebra quail")["input_ids"]).strip() == "zebra quail"
