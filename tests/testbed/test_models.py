"""The bed's model folders: the same bytes everywhere, loadable by the Auto classes, shapes known without
torch."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.testbed import (
    CHARACTERS,
    SIZES,
    VOCABULARY,
    model_config,
    model_files,
    parameter_shapes,
    write_model_folder,
)
from weightsmith.testbed.alphabet import clean, encode


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model_folder("xs", tmp_path_factory.mktemp("xs"))


def test_writing_a_folder_needs_neither_torch_nor_transformers(tmp_path):
    code = (
        "import sys; from weightsmith import testbed;"
        f"testbed.write_model_folder('xs', {str(tmp_path)!r}); testbed.text('docs', 'test');"
        "testbed.parameter_shapes(testbed.model_config('m'));"
        "print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_two_folders_are_the_same_bytes(folder, tmp_path):
    second = write_model_folder("xs", tmp_path / "again")
    for name, content in model_files("xs").items():
        assert (folder / name).read_bytes() == (second / name).read_bytes() == content.encode()


def test_the_files_have_not_changed_by_accident():
    """Whoever changes them changes every number measured on the bed: measure again, then update this."""
    files = json.dumps(model_files("s"), sort_keys=True).encode()
    assert hashlib.blake2b(files, digest_size=8).hexdigest() == "8623ec1ed2364df1"


@pytest.mark.parametrize("size", SIZES)
def test_parameter_shapes_are_those_of_the_real_model(size, tmp_path):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(write_model_folder(size, tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert parameter_shapes(model_config(size)) == real
    assert type(model).__name__ == "LlamaForCausalLM"


def test_parameter_shapes_know_grouped_heads_biases_and_tied_embeddings(tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=17, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    real = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }
    assert parameter_shapes(config.to_dict()) == real


def test_sizes_are_those_of_the_specification():
    count = {
        size: sum(int(np.prod(shape)) for shape in parameter_shapes(model_config(size)).values())
        for size in SIZES
    }
    assert 0.45e6 < count["xs"] < 0.47e6
    assert 1.3e6 < count["s"] < 1.4e6
    assert 27e6 < count["m"] < 29e6


def test_the_tokenizer_is_the_table_look_up(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = CHARACTERS + "tab\tnaïve\r\n🙂 <eos> end"
    plain = text.replace("<eos>", "")
    assert len(tokenizer) == len(VOCABULARY) == 100
    assert tokenizer(plain, add_special_tokens=True)["input_ids"] == encode(plain).tolist()
    assert tokenizer.decode(encode(plain).tolist()) == clean(plain)
    assert tokenizer("<eos>")["input_ids"] == [VOCABULARY["<eos>"]]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (VOCABULARY["<pad>"], VOCABULARY["<eos>"])
    assert (tokenizer.unk_token_id, tokenizer.mask_token_id) == (VOCABULARY["<unk>"], VOCABULARY["<mask>"])


def test_decoding_gives_the_text_back(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x , 1  # two  spaces .\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_unknown_size_names_the_nearest():
    with pytest.raises(InputError, match="no test-bed size `xxs`; did you mean `xs`"):
        model_config("xxs")


def test_shapes_of_another_architecture_are_refused():
    with pytest.raises(InputError, match="llama, got 'gpt2'"):
        parameter_shapes({"model_type": "gpt2"})
