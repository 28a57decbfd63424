"""Pruned checkpoints with matrices that are packed for sparse tensor cores.

CUTLASS's layout is made and read by plain tensor operations, so all but the products runs without a GPU.
"""

import json

import pytest
import torch
from safetensors import safe_open
from torch.sparse import SparseSemiStructuredTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression import load_semi_structured, prune_checkpoint, read_masks
from weightsmith.compression.nm import MagnitudeOptions, SparseGPTOptions, folders, packed, semi_structured
from weightsmith.errors import CheckpointError, InputError
from weightsmith.testbed import model_config, write_model_folder


@pytest.fixture
def dense(tmp_path):
    """A small Llama whose matrices can be packed, stored in bfloat16."""
    folder = write_model_folder("xs", tmp_path / "dense")
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, head_dim=32)
    LlamaForCausalLM(LlamaConfig(**(model_config("xs") | sizes))).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def cutlass_on_cpu(monkeypatch):
    """As if this machine multiplied by CUTLASS; the product is what the packed matrix stands for."""

    def product(name, made, weight):
        assert torch.equal(made.to_dense(), weight)

    for module in (folders, packed, semi_structured):
        monkeypatch.setattr(module, "sparse_library", lambda: "cutlass")
    monkeypatch.setattr(packed, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(packed, "_check_product", product)
    monkeypatch.setattr(
        SparseSemiStructuredTensor, "_validate_device_dim_dtype_shape", classmethod(lambda cls, tensor: None)
    )


def batches():
    rows = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": rows, "labels": rows}]


@pytest.mark.parametrize(
    "options", [MagnitudeOptions(), SparseGPTOptions(block_size=32)], ids=lambda o: o.kind
)
def test_packed_matrices_are_those_of_the_dense_checkpoint_beside_them(
    dense, options, cutlass_on_cpu, tmp_path
):
    report = prune_checkpoint(dense, tmp_path / "out", options, batches(), export="semi-structured")
    assert report.packed_by == "cutlass"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, tokenizer = load_semi_structured(tmp_path / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(dense).get_vocab()
    masks = read_masks(tmp_path / "out")
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if name in masks:
            assert isinstance(parameter.data, SparseSemiStructuredTensor)
            assert torch.equal(parameter.data.to_dense(), expected[name])
            assert bool((expected[name] != 0).any())
        else:
            assert torch.equal(parameter, expected[name])
    assert len(masks) == 14
    assert not model.training


def test_the_dense_files_are_those_of_a_dense_export(dense, cutlass_on_cpu, tmp_path):
    for name, export in (("plain", "dense"), ("packed", "semi-structured")):
        prune_checkpoint(dense, tmp_path / name, MagnitudeOptions(), export=export)
    with Checkpoint.open(tmp_path / "plain") as one, Checkpoint.open(tmp_path / "packed") as other:
        assert one.fingerprint(full=True) == other.fingerprint(full=True)
    extra = {file.name for file in (tmp_path / "packed" / "weightsmith").iterdir()} - {
        file.name for file in (tmp_path / "plain" / "weightsmith").iterdir()
    }
    assert extra == {"semi_structured.safetensors", "semi_structured.json"}
    with Checkpoint.open(tmp_path / "plain") as checkpoint:
        pruned = sum(checkpoint.tensors[name].numel for name in read_masks(tmp_path / "plain"))
    with safe_open(str(tmp_path / "packed" / "weightsmith" / "semi_structured.safetensors"), "pt") as file:
        held = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert held == 2 * pruned * 9 // 16


def test_what_another_library_packed_is_packed_again(dense, cutlass_on_cpu, tmp_path, monkeypatch):
    prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(), export="semi-structured")
    facts = tmp_path / "out" / "weightsmith" / "semi_structured.json"
    said = json.loads(facts.read_text()) | {"library": "cusparselt", "version": 0, "capability": [9, 0]}
    facts.write_text(json.dumps(said))
    (tmp_path / "out" / "weightsmith" / "semi_structured.safetensors").write_bytes(b"of another layout")
    again = []

    def pack_again(model, masks):
        again.append((model.dtype, sorted(masks)))
        return model

    monkeypatch.setattr(packed, "to_semi_structured_", pack_again)
    load_semi_structured(tmp_path / "out")
    assert again == [(torch.bfloat16, sorted(read_masks(tmp_path / "out")))]


def test_damaged_packed_matrices_are_said(dense, cutlass_on_cpu, tmp_path):
    prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(), export="semi-structured")
    file = tmp_path / "out" / "weightsmith" / "semi_structured.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"semi_structured\.safetensors: damaged packed matrices"):
        load_semi_structured(tmp_path / "out")


def test_a_matrix_that_cannot_be_packed_is_said_before_anything_is_computed(
    dense, cutlass_on_cpu, tmp_path, monkeypatch
):
    monkeypatch.setattr(folders, "prune_", lambda *_, **__: pytest.fail("pruning began"))
    with pytest.raises(InputError, match=r"q_proj\.weight: semi-structured matrices are 2:4 .* is 1:4"):
        prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(pattern="1:4"), export="semi-structured")
    sizes = json.loads((dense / "config.json").read_text()) | {"intermediate_size": 96}
    LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().save_pretrained(dense)
    with pytest.raises(InputError, match=r"down_proj\.weight: cutlass needs rows .* columns of 64"):
        prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(), export="semi-structured")
    assert not (tmp_path / "out").exists()


def test_a_product_that_is_off_or_not_there_is_said():
    weight = torch.eye(4)
    with pytest.raises(InputError, match=r"^w: its packed product is off by 0\.5\. Nothing was written"):
        packed._check_product("w", weight * 1.5, weight)
    with pytest.raises(InputError, match=r"^w: its packed product is off by nan"):
        packed._check_product("w", weight * torch.nan, weight)
    with pytest.raises(InputError, match=r"^w: this GPU can't multiply by it"):
        packed._check_product("w", torch.ones(4, 3), weight)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda_one_line_says_so_and_nothing_is_written(dense, tmp_path):
    message = (
        r"^semi-structured matrices need a CUDA device, this machine has none; the dense .* runs anywhere"
    )
    with pytest.raises(InputError, match=message):
        prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(), export="semi-structured")
    assert not (tmp_path / "out").exists()
    prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions())
    with pytest.raises(InputError, match=message):
        load_semi_structured(tmp_path / "out")


@pytest.mark.gpu
@pytest.mark.parametrize("exported", [True, False])
def test_on_a_gpu_the_packed_model_computes_what_the_dense_one_does(dense, tmp_path, exported):
    export = "semi-structured" if exported else "dense"
    prune_checkpoint(dense, tmp_path / "out", MagnitudeOptions(), export=export)
    model, _ = load_semi_structured(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).cuda().eval()
    tokens = batches()[0]["input_ids"].cuda()
    with torch.inference_mode():
        expected, found = plain(tokens).logits, model(tokens).logits
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)
