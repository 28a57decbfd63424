"""Reading: values, ranges, threads, folders that contradict themselves, and what is refused."""

import json
import re
import shutil
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.folder import MASKS_FILE, resolve
from weightsmith.errors import CheckpointError, InputError, SystemFault
from weightsmith.tensors.floats import BLOCK


def test_shards_and_single_file_are_the_same_map(write_model, tensors):
    with (
        Checkpoint.open(write_model("one", tensors)) as one,
        Checkpoint.open(write_model("three", tensors, shards=3)) as three,
    ):
        assert list(one.tensors) == list(three.tensors) == sorted(tensors)
        for name, values in tensors.items():
            assert one.tensors[name].shape == three.tensors[name].shape == values.shape
            np.testing.assert_array_equal(one.read(name), values.ravel())
            np.testing.assert_array_equal(three.read(name), values.ravel())
        assert one.name == "one"
        assert one.config["model_type"] == "llama"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float32])
def test_any_range_of_any_float_comes_as_float32(tmp_path, dtype):
    size = 2 * BLOCK + 77
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_torch({"w": values}, tmp_path / "model.safetensors")
    expected = values.float().numpy()
    with Checkpoint.open(tmp_path) as checkpoint:
        for start, stop in [(0, None), (1, 2), (5, 5), (BLOCK - 1, 2 * BLOCK + 3), (size - 1, size)]:
            np.testing.assert_array_equal(checkpoint.read("w", start, stop), expected[start:stop])
            raw = checkpoint.read_raw("w", start, stop)
            np.testing.assert_array_equal(
                raw, values.view(torch.uint8).numpy()[start * dtype.itemsize :][: raw.size]
            )
        out = np.full(100, np.nan, np.float32)
        assert checkpoint.read("w", 7, 107, out) is out
        np.testing.assert_array_equal(out, expected[7:107])


def test_integers_come_as_they_are_and_one_byte_floats_as_bytes(tmp_path):
    stored = {
        "i": torch.arange(6),
        "b": torch.tensor([True, False]),
        "f": torch.ones(4).to(torch.float8_e4m3fn),
    }
    save_torch(stored, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read("i", 2, 4).tolist() == [2, 3]
        assert checkpoint.read("i").dtype == np.int64
        assert checkpoint.read("b").tolist() == [True, False]
        assert checkpoint.read("f").tolist() == [0x38] * 4
        assert checkpoint.quantized == "tensor `f` is stored as F8_E4M3"


def test_ranges_outside_and_wrong_buffers_are_programming_errors(write_model, tensors):
    with Checkpoint.open(write_model("m", tensors)) as checkpoint:
        for start, stop in [(-1, 2), (0, 9), (5, 4)]:
            with pytest.raises(ValueError, match="elements"):
                checkpoint.read("model.norm.weight", start, stop)
        for out in (np.empty(7, np.float32), np.empty(8, np.float64), np.empty(16, np.float32)[::2]):
            with pytest.raises(ValueError, match="out must be"):
                checkpoint.read("model.norm.weight", out=out)
    with pytest.raises(ValueError, match="closed"):
        checkpoint.read("model.norm.weight")


def test_many_threads_read_the_same_files_at_once(write_model, rng):
    tensors = {f"t{i}": rng.standard_normal(50_000).astype(np.float32) for i in range(4)}
    with Checkpoint.open(write_model("m", tensors)) as checkpoint, ThreadPoolExecutor(8) as pool:
        jobs = [(f"t{i % 4}", 1000 * (i % 50), 1000 * (i % 50) + 1000) for i in range(400)]
        for (name, start, stop), got in zip(
            jobs, pool.map(lambda job: checkpoint.read(*job), jobs), strict=True
        ):
            np.testing.assert_array_equal(got, tensors[name][start:stop])


def test_reading_in_tiles_allocates_no_more_than_tiles(tmp_path):
    save_torch({"w": torch.zeros(16 * BLOCK, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    out = np.empty(BLOCK, np.float32)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read("w", 0, BLOCK, out)  # the thread's scratch
        tracemalloc.start()
        for start in range(0, 16 * BLOCK, BLOCK):
            checkpoint.read("w", start, start + BLOCK, out)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 20_000


def test_a_tied_head_is_known_and_read_as_the_embedding(write_model, tensors):
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
    tensors.pop("lm_head.weight")
    with Checkpoint.open(write_model("tied", tensors, config)) as checkpoint:
        assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
        assert "lm_head.weight" not in checkpoint.tensors
        np.testing.assert_array_equal(
            checkpoint.read("lm_head.weight", 3, 9), tensors["model.embed_tokens.weight"].ravel()[3:9]
        )


def test_an_unknown_tensor_names_the_nearest(write_model, tensors):
    with (
        Checkpoint.open(write_model("m", tensors)) as checkpoint,
        pytest.raises(
            CheckpointError, match=r"m: no tensor `model.norm.wieght`; did you mean `model.norm.weight`"
        ),
    ):
        checkpoint.read("model.norm.wieght")


def test_a_file_cut_after_opening_is_one_line(write_model, rng):
    folder = write_model("m", {"w": rng.standard_normal(1000).astype(np.float32)})
    with Checkpoint.open(folder) as checkpoint:
        with open(folder / "model.safetensors", "r+b") as file:
            file.truncate(2000)
        with pytest.raises(CheckpointError, match=r"file of tensor `w` ended \d+ bytes early"):
            checkpoint.read("w")
        assert checkpoint.read_pieces("w", [0, 8], 8) == checkpoint.read_raw("w", 0, 4).tobytes()
        with pytest.raises(CheckpointError, match=r"file of tensor `w` ended \d+ bytes early"):
            checkpoint.read_pieces("w", [0, 3000], 8)


def test_side_files_are_copied_and_weights_pickle_and_lineage_never(write_model, tensors):
    folder = write_model("m", tensors, shards=2)
    for name in [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "chat_template.jinja",
        "modeling_mine.py",
        "LICENSE.txt",
        "training_args.bin",
        "optimizer.pt",
        "weightsmith.json",
        "README.md",
        "trainer_state.json",
    ]:
        (folder / name).write_text("x")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    (folder / "checkpoint-5").mkdir()
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.side_file_map()) == [
            "LICENSE.txt",
            "additional_chat_templates/tool.jinja",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "modeling_mine.py",
            "tokenizer.json",
            "tokenizer.model",
        ]
        assert checkpoint.side_files == tuple(checkpoint.side_file_map().values())


def edit_index(folder, change):
    index = folder / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    change(value["weight_map"])
    index.write_text(json.dumps(value))


def lose_shard(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def twice(folder):
    """The second shard holds what the first has, too."""
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")


CONTRADICTIONS = {
    "a shard is missing": (lose_shard, r"model-00002-of-00003.safetensors: shard is missing; .* 2 tensors"),
    "a tensor in two shards": (twice, r"is also in model-00001-of-00003.safetensors"),
    "a name in the index alone": (
        lambda folder: edit_index(folder, lambda m: m.update({"ghost": "model-00001-of-00003.safetensors"})),
        r"tensor `ghost` is not in model-00001-of-00003.safetensors",
    ),
    "a name in a shard alone": (
        lambda folder: edit_index(folder, lambda m: m.pop("model.norm.weight")),
        r"tensor `model.norm.weight` is not in model.safetensors.index.json",
    ),
    "the wrong shard": (
        lambda folder: edit_index(
            folder, lambda m: m.update({"model.norm.weight": "model-00002-of-00003.safetensors"})
        ),
        r"tensor `model.norm.weight` is in model-00001-of-00003.safetensors, not in model-00002",
    ),
    "a shard outside the folder": (
        lambda folder: edit_index(folder, lambda m: m.update({"x": "../model.safetensors"})),
        r"placed in '../model.safetensors', expected",
    ),
    "an index that is no JSON": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{"),
        r"index.json: not valid JSON",
    ),
    "an index without a map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": []}'),
        r"no `weight_map`",
    ),
    "a config that is a list": (
        lambda folder: (folder / "config.json").write_text("[]"),
        r"config.json: holds list, expected a JSON object",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_folder_that_contradicts_itself_is_refused_in_one_line(case, write_model, tensors):
    spoil, message = CONTRADICTIONS[case]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    folder = write_model(
        "m", {name: tensors[name] for name in [*sorted(tensors)[:6], "model.norm.weight"]}, shards=3
    )
    spoil(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)


def test_pickle_is_refused_with_the_conversion(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: pickle .* python -c .*save_pretrained"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("llama.gguf", "holds GGUF weights"),
        ("other.safetensors", "found other.safetensors but no index"),
        ("config.json", "no weights: expected model.safetensors"),
    ],
)
def test_a_folder_without_weights_says_what_it_has(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


def test_a_missing_folder_and_a_file_are_told_apart(tmp_path, write_model, tensors):
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    file = write_model("m", tensors) / "model.safetensors"
    with pytest.raises(CheckpointError, match="a file; expected the folder"):
        Checkpoint.open(file)


@pytest.mark.parametrize(
    ("switched_off", "why"), [(True, "is switched off (HF_HUB_OFFLINE)"), (False, "is not asked")]
)
def test_a_hub_id_that_cannot_be_had_is_one_line(monkeypatch, tmp_path, switched_off, why):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", switched_off)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open("nobody/nothing", offline=True)
    assert str(caught.value) == (
        f"nobody/nothing: no such folder, the hub {why}, and its local cache has no such model"
    )
    assert isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("models/cod", "; did you mean `code`?"),
        ("models/other", "; for the hub's model write models/other@main"),
        ("./other", ""),
        ("~/no/such", ""),
        ("a/b/c", ""),
    ],
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(monkeypatch, tmp_path, name, said):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "models" / "code").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(f'{name}: no such folder{said}')}$"):
        Checkpoint.open(name)


def test_a_hub_id_in_the_local_cache_is_opened_without_the_hub(monkeypatch, write_model, tensors, tmp_path):
    import huggingface_hub

    folder = write_model("cached", tensors)
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    with Checkpoint.open("owner/model@v1", offline=True) as checkpoint:
        assert checkpoint.name == "owner/model@v1"
    assert (asked["repo"], asked["revision"], asked["local_files_only"]) == ("owner/model", "v1", True)
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


class Hub:
    """A folder that stands in for a hub model: `snapshot_download` copies what its patterns let through."""

    def __init__(self, published, cache):
        self.published, self.cache, self.asked = published, cache, []

    def __call__(self, repo, *, revision, allow_patterns, ignore_patterns=None, local_files_only):
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append((revision, tuple(allow_patterns)))
        files = [str(f.relative_to(self.published)) for f in self.published.rglob("*") if f.is_file()]
        snapshot = self.cache / "snapshots" / ("c" * 40)
        if not local_files_only:
            for name in filter_repo_objects(
                files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
            ):
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.published / name, snapshot / name)
        return str(snapshot)


@pytest.mark.parametrize("lineage", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
def test_the_masks_of_a_pruned_hub_model_come_with_its_weights(
    monkeypatch, write_model, tensors, tmp_path, lineage, pruned
):
    import huggingface_hub

    published = write_model("published", tensors)
    (published / "onnx").mkdir()
    (published / "onnx" / "model.safetensors").write_bytes(b"another model")
    (published / "weightsmith").mkdir()
    (published / "weightsmith" / "other.safetensors").write_bytes(b"something else of ours")
    if pruned:
        (published / MASKS_FILE).write_bytes(b"masks")
    if lineage:
        (published / "weightsmith.json").write_text("{}")
    hub = Hub(published, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    folder, _ = resolve("owner/model@v1")
    assert (folder / MASKS_FILE).is_file() == (lineage and pruned)
    inside = {str(file.relative_to(folder)) for file in folder.rglob("*/*.safetensors")}
    assert inside == ({MASKS_FILE} if lineage and pruned else set())
    # One more question, and only about models that may be pruned ones of ours.
    assert hub.asked[1:] == ([("c" * 40, (MASKS_FILE,))] if lineage else [])
    resolve("owner/model@v1", weights=False)
    resolve("owner/model@v1", offline=True)
    assert sum(patterns == (MASKS_FILE,) for _, patterns in hub.asked) == lineage + (lineage and not pruned)


def test_a_stage_checkpoint_is_called_by_its_stage(write_model, tensors):
    with Checkpoint.open(write_model("stages/code/checkpoint", tensors)) as checkpoint:
        assert checkpoint.name == "code"


def test_a_folder_the_system_will_not_show_is_a_system_fault(write_model, tensors, monkeypatch):
    folder = write_model("m", tensors)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(folder), "iterdir", refuse)
    with pytest.raises(SystemFault, match="m: permission denied"):
        Checkpoint.open(folder)
    monkeypatch.undo()
    with Checkpoint.open(folder) as checkpoint:
        monkeypatch.setattr("os.preadv", refuse)
        with pytest.raises(SystemFault, match=r"reading tensor `model.norm.weight`: Permission denied"):
            checkpoint.read("model.norm.weight")


def test_quantised_models_open_and_say_so(write_model, tensors):
    config = {"quantization_config": {"quant_method": "gptq"}}
    with Checkpoint.open(write_model("q", tensors, config)) as checkpoint:
        assert checkpoint.quantized == "config.json says quantization_config.quant_method = gptq"
    with Checkpoint.open(write_model("p", tensors)) as checkpoint:
        assert checkpoint.quantized == ""


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("architectures", 3, "a list of names"),
        ("model_type", ["llama"], "a name"),
        ("text_config", 1, "an object"),
    ],
)
def test_a_config_that_is_not_what_it_should_be_names_the_key(write_model, tensors, key, value, wanted):
    folder = write_model("m", tensors)
    (folder / "config.json").write_text(json.dumps({key: value}))
    with pytest.raises(CheckpointError, match=re.escape(f"config.json: {key}: {value!r}, expected {wanted}")):
        Checkpoint.open(folder)


def test_a_weights_file_that_is_a_link_to_nothing_is_told_as_that(write_model, tensors):
    weights = write_model("m", tensors) / "model.safetensors"
    weights.unlink()
    weights.symlink_to("gone")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a link to nothing; expected the weights"):
        Checkpoint.open(weights.parent)
