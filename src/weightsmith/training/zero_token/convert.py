"""A Llama, Mistral or Qwen checkpoint as a Zero-Token Transformer: its weights, and zero tokens.

By default later cycles are gated by zero and zero tokens start at a score of -6, so the converted model
computes what its base does, up to the little that flows to the zero tokens. Weights are copied as stored
bytes, piece by piece: memory does not grow with the model, and torch is not imported.

Source  arXiv:2502.12214 fine-tunes existing models; how it starts them is not known.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.runs.environment import versions
from weightsmith.runs.progress import SILENT, Progress
from weightsmith.runs.seeds import derive
from weightsmith.tensors.floats import BLOCK, FLOAT_DTYPES
from weightsmith.training.zero_token import options as layout
from weightsmith.training.zero_token.options import ZTTOptions, config_of, extra_shapes, shapes_of

if TYPE_CHECKING:
    from weightsmith.training.zero_token.modeling import ZTTForCausalLM

_FOREIGN = re.compile(r".*\.\d+\..*(qkv|query_key_value|c_attn|linear_attn|mixer|mamba|kv_a|experts).*")


@dataclass(frozen=True)
class ConvertPlan:
    """A conversion with nothing left open.

    Attributes:
        config: Content of the new `config.json`.
        specs: Every tensor.
        copied: Names of those that the base has.
        side_files: Every other file.
        lineage: Its `weightsmith.json`.
        seed: Of the zero keys.
    """

    config: Mapping[str, Any]
    specs: tuple[TensorSpec, ...]
    copied: frozenset[str]
    side_files: Mapping[str, Path | bytes]
    lineage: Lineage
    seed: int


def plan_conversion(source: str | Path | Checkpoint, options: ZTTOptions, *, seed: int = 0) -> ConvertPlan:
    """Plan a conversion from headers alone.

    Raises:
        CheckpointError: no readable checkpoint, or a layer that we don't have; names the module.
        InputError: the options don't fit the model.
    """
    if not isinstance(source, Checkpoint):
        with Checkpoint.open(source) as opened:
            return plan_conversion(opened, options, seed=seed)
    base = source
    _refuse_what_cannot_be_cycled(base)
    tied = base.tied.get("lm_head.weight") is not None or bool(base.config.get("tie_word_embeddings"))
    config = config_of({**base.config, "tie_word_embeddings": tied}, options, converting=True)
    extra = extra_shapes(config)
    wanted = shapes_of(config)
    ignored = {"lm_head.weight"} if tied else set()
    for name, info in base.tensors.items():
        if name in ignored or name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in wanted:
            raise CheckpointError(f"{base.name}: {name} has no place in a {config['model_type']} model")
        if info.shape != wanted[name]:
            raise CheckpointError(
                f"{base.name}: {name} is {info.shape}, its config.json makes it {wanted[name]}"
            )
    missing = next((name for name in wanted if name not in extra and name not in base.tensors), None)
    if missing is not None:
        raise CheckpointError(f"{base.name}: no tensor {missing}, which its config.json asks for")
    dtype = base.tensors[f"model.layers.{options.num_head_layers}.self_attn.k_proj.weight"].dtype
    specs = [
        TensorSpec(name, dtype if name in extra else base.tensors[name].dtype, shape)
        for name, shape in sorted(wanted.items())
    ]
    files: dict[str, Path | bytes] = dict(base.side_file_map())
    files["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    parameters = {key: config[key] for key in ZTTOptions.__dataclass_fields__}
    return ConvertPlan(
        config=config,
        specs=tuple(specs),
        copied=frozenset(set(wanted) - set(extra)),
        side_files=files,
        lineage=Lineage(
            method="ztt",
            parameters=parameters,
            seed=seed,
            inputs=(Ancestor.of(base, "base"),),
            versions=versions(),
        ),
        seed=seed,
    )


def convert(
    source: str | Path,
    out: str | Path,
    options: ZTTOptions | None = None,
    *,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Path:
    """Convert a checkpoint folder or hub model; nothing is visible under `out` before it is complete.

    Args:
        source: Folder or hub id of a Llama, Mistral, Qwen2 or Qwen3.
        out: Folder to write.
        options: How; by default two cycles.
        seed: Of the zero keys.
        overwrite: Replace `out` when it exists.
        progress: Told how many elements are written.

    Returns:
        `out`. It loads with `AutoModelForCausalLM` after `weightsmith.training.ZTTForCausalLM` was imported.

    Raises:
        CheckpointError: as `plan_conversion`, or `out` exists.
        InputError: the options don't fit the model.
        SystemFault: no space, no permission.
    """
    with Checkpoint.open(source) as base:
        planned = plan_conversion(base, options or ZTTOptions(), seed=seed)
        with CheckpointWriter(
            out, planned.specs, side_files=planned.side_files, lineage=planned.lineage, overwrite=overwrite
        ) as writer:
            progress.start("converting", sum(spec.numel for spec in planned.specs), "elements")
            for spec in planned.specs:
                if spec.name in planned.copied:
                    for start in range(0, spec.numel, BLOCK):
                        stop = min(start + BLOCK, spec.numel)
                        writer.write_raw(spec.name, base.read_raw(spec.name, start, stop), start)
                else:
                    writer.write(spec.name, first_values(spec.name, spec.shape, planned.config, seed))
                progress.advance(spec.numel)
            progress.done()
            return writer.commit()


def first_values(name: str, shape: tuple[int, ...], config: Mapping[str, Any], seed: int) -> np.ndarray:
    """What a tensor of ours starts from, float32."""
    if name == layout.KEYS:
        rng = np.random.default_rng(derive(seed, "zero keys"))
        return (layout.KEY_STD * rng.standard_normal(shape)).astype(np.float32)
    return np.full(shape, config["zero_bias_init"] if name == layout.SCORES else 0.0, np.float32)


def convert_to_ztt(model: Any, options: ZTTOptions | None = None, *, seed: int = 0) -> ZTTForCausalLM:
    """The same in memory: a new model that shares no tensors with `model`.

    Args:
        model: A `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` or `Qwen3ForCausalLM`.
        options: How; by default two cycles.
        seed: Of the zero keys.

    Raises:
        InputError: the model is another one, or the options don't fit it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        >>> ztt = convert_to_ztt(LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **sizes)))
        >>> ztt.config.num_cycles, ztt.config.num_hidden_layers
        (2, 6)
    """
    import torch

    if model.config.model_type not in (*layout.BASES, layout.MODEL_TYPE):
        raise InputError(_not_ours(model.config.model_type, model.state_dict()))
    config = config_of(model.config.to_dict(), options or ZTTOptions(), converting=True)
    state = dict(model.state_dict())
    for name, shape in extra_shapes(config).items():
        state[name] = torch.from_numpy(first_values(name, shape, config, seed))
    return _filled(_unfilled(config, model), state, model)


def resize_cycles(model: ZTTForCausalLM, num_cycles: int) -> ZTTForCausalLM:
    """The model with another number of cycles: new ones begin with the last one's zero tokens, behind a
    closed gate where the model has gates.

    Raises:
        InputError: fewer than one, or `model` is another one.
    """
    if model.config.model_type != layout.MODEL_TYPE:
        raise InputError(
            f"model: expected a ZTTForCausalLM, found {type(model).__name__}; `convert_to_ztt` makes one"
        )
    config = {**model.config.to_dict(), "num_cycles": num_cycles}
    config["min_cycles"] = min(model.config.min_cycles, num_cycles)
    if num_cycles == 1:
        config |= layout.WITH_ONE_CYCLE
    made = _unfilled(config, model)
    state = dict(model.state_dict())
    for name, shape in extra_shapes(config).items():
        old = state.pop(name, None)
        new = made.state_dict()[name].clone()
        if name == layout.CYCLES:
            new.zero_()
        if old is not None:
            count = min(len(old), shape[0])
            new[:count] = old[:count]
            if name != layout.CYCLES:
                new[count:] = old[-1]
        state[name] = new
    if num_cycles == 1:
        state.pop(layout.CYCLES, None)
    return _filled(made, state, model)


def _unfilled(config: Mapping[str, Any], model: Any) -> Any:
    """A model of a config in the type of `model`, with its attention."""
    from weightsmith.training.zero_token.config import ZTTConfig
    from weightsmith.training.zero_token.modeling import ZTTForCausalLM

    # Made in its type, not cast: frequencies of the rotary embedding stay float32 in a model of sixteen bits.
    return ZTTForCausalLM._from_config(
        ZTTConfig.from_dict(dict(config)),
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )


def _filled(made: Any, state: Mapping[str, Any], model: Any) -> Any:
    """`made` with its weights, where and as `model` is.

    Raises:
        InputError: `model` has other tensors than a plain one; names the first.
    """
    odd = sorted(state.keys() ^ made.state_dict().keys())
    if odd:
        raise InputError(
            f"model: expected a plain causal language model, found {type(model).__name__} "
            f"{'with' if odd[0] in state else 'without'} {odd[0]}; `merge_and_unload` an adapter first"
        )
    made.load_state_dict(state)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


def _not_ours(kind: str | None, names: Iterable[str]) -> str:
    odd = next((name for name in names if _FOREIGN.fullmatch(name)), None)
    why = f", and it has {odd.rpartition('.')[0]}, which is none of ours" if odd else ""
    return (
        f"model_type {kind} can't be cycled{why}; expected {', '.join(layout.BASES)} with "
        "self_attn.k_proj and v_proj"
    )


def _refuse_what_cannot_be_cycled(base: Checkpoint) -> None:
    if base.quantized:
        raise CheckpointError(f"{base.name}: can't be converted: {base.quantized}")
    if (base.path / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{base.name}: an adapter; merge it into its base first (`weightsmith merge` with method linear)"
        )
    kind = base.config.get("model_type")
    if kind not in (*layout.BASES, layout.MODEL_TYPE):
        raise CheckpointError(f"{base.name}: {_not_ours(kind, base.tensors)}")
    for name, info in base.tensors.items():
        if info.dtype not in FLOAT_DTYPES:
            raise InputError(f"{base.name}: {name} is {info.dtype}, expected float weights")
