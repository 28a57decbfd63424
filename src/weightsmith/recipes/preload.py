"""Imported once by the server that torch stages are forked from: what all of them need and nobody wants to
wait for.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # counts only before torch loads; this process is ours alone

import accelerate  # noqa: F401
import torch  # noqa: F401
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401

from weightsmith.recipes import worker  # noqa: F401
from weightsmith.recipes.stages import evaluate, finetune, merge, train  # noqa: F401

# Collections in a child would touch, and so copy, every page of what was imported here.
gc.freeze()
