"""Chat templates: how a conversation becomes the text a model was tuned on; the output of a merge has one.

A page may ask for `auto` (the template that most of the models have), for one of the formats below by name,
or give the text of a Jinja template. Without a word the output keeps the template of its tokenizer.

Where    transformers reads `chat_template.jinja` before the `chat_template` of tokenizer_config.json, so that
         file is written and the other places are emptied.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.checkpoints import Checkpoint

Files = Mapping[str, Path | bytes]

_FILE, _CONFIG, _OLD = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
{{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_MISTRAL = """\
{%- set start = 1 if messages[0]['role'] == 'system' else 0 %}
{{- bos_token }}
{%- for message in messages[start:] %}
{%- set wanted = 'user' if loop.index0 % 2 == 0 else 'assistant' %}
{%- if message['role'] != wanted %}
{{- raise_exception('expected a message of the ' + wanted + ', found one of the ' + message['role']) }}
{%- elif wanted == 'user' %}
{%- set lead = messages[0]['content'] + '\\n\\n' if start and loop.first else '' %}
{{- ' [INST] ' + lead + message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}
"""
_ALPACA = """\
{%- set heads = {
  'system': '', 'user': '### Instruction:\\n',
  'user_context': '### Input:\\n', 'assistant': '### Response:\\n'
} %}
{%- for message in messages %}
{{- heads[message['role']] + message['content'] | trim }}
{{- '' if loop.last and not add_generation_prompt else '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- heads['assistant'] }}
{%- endif %}
"""
_EXAONE = """\
{%- if messages[0]['role'] != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '[|' + message['role'] + '|]' + message['content'] }}
{{- '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""
BUILT_IN = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Formats by the names that mergekit's pages use."""


def read_template(files: Files) -> str | None:
    """The template among the side files of a checkpoint, None where it has none.

    Args:
        files: Name -> the file or its content.
    """
    if _FILE in files:
        return _content(files[_FILE]).decode()
    for name in (_CONFIG, _OLD):
        found = json.loads(_content(files[name])).get("chat_template") if name in files else None
        if isinstance(found, list):  # several by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None


def chosen(asked: str, models: Sequence[Checkpoint]) -> tuple[str | None, str]:
    """The text of the template that a page asks for, and a word on where it is from.

    Args:
        asked: See the text of this module.
        models: Candidates of `auto`, in the page's order; of several as frequent the first is taken.

    Returns:
        The text, None where no model has one; what to say about it.
    """
    if asked in BUILT_IN:
        return BUILT_IN[asked], f"`{asked}`"
    if asked != "auto":
        return asked, "the page's own"
    owners: dict[str, list[str]] = {}
    for model in models:
        template = read_template(model.side_file_map())
        if template and template.strip():
            owners.setdefault(template.strip(), []).append(model.name)
    counts = Counter({template: len(names) for template, names in owners.items()})
    if not counts:
        return None, "none: no model has one"
    best = counts.most_common(1)[0][0]
    return best, f"that of {', '.join(owners[best])}"


def with_template(files: Files, template: str) -> dict[str, Path | bytes]:
    """The side files with this template and no other."""
    kept = {
        name: file
        for name, file in files.items()
        if name != _OLD and not name.startswith("additional_chat_templates/")
    }
    if _CONFIG in kept:
        config: dict[str, Any] = json.loads(_content(kept[_CONFIG]))
        if config.pop("chat_template", None) is not None:
            kept[_CONFIG] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    kept[_FILE] = template.encode()
    return dict(sorted(kept.items()))


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()
