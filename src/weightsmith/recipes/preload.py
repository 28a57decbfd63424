"""Imported once by the server that torch stages are forked from: what all of them need and nobody wants to
wait for.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # counts only before torch loads; this process is ours alone

import torch  # noqa: F401
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401
