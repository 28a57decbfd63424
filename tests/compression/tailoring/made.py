"""Tiny random families, and tasks whose answers are known without a model."""

import contextlib
import copy

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from weightsmith.compression.tailoring.book import Book

TOKENS = 32


class Killed(Exception):
    """Stands for a kill."""


@contextlib.contextmanager
def killed_after(trials):
    """A search inside ends as if killed, before the trial after so many is written down."""
    finish, done = Book.finish, []

    def until(book, number, outcome):
        if len(done) == trials:
            raise Killed
        finish(book, number, outcome)
        done.append(number)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Book, "finish", until)
        with pytest.raises(Killed):
            yield


def llama(depth=4, seed=0, tied=False, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    config = LlamaConfig(
        num_hidden_layers=depth, max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, **(sizes | changes),
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gemma(depth=6, seed=0):
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=depth,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, sliding_window=4, initializer_range=0.2,
        max_position_embeddings=64,
        layer_types=["full_attention" if place % 3 == 2 else "sliding_attention" for place in range(depth)],
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def gpt2(depth=4, seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=TOKENS, n_embd=16, n_layer=depth, n_head=2, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


KINDS = {"llama": llama, "gemma": gemma, "gpt2": gpt2}


def near(model, seed, size=0.05):
    """A fine-tune: the model and some noise on every weight."""
    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value += size * torch.randn(value.shape, generator=generator)
    return made


def family(kind="llama", count=2, depth=None):
    """A base and its fine-tunes."""
    base = KINDS[kind](**({} if depth is None else {"depth": depth}))
    return base, [near(base, seed) for seed in range(1, count + 1)]


def ids(rows=2, length=12, seed=5):
    return torch.randint(3, TOKENS, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model, tokens=None):
    with torch.inference_mode():
        return model(input_ids=ids() if tokens is None else tokens, use_cache=False).logits


class Likelihood:
    """A task on random tokens: the probability of each row's last token."""

    strata = None

    def __init__(self, name="last", size=12, seed=7):
        self.name, self.size, self.rows = name, size, ids(size, 10, seed)
        self.calls = []

    def prepare(self, base):
        return self

    def token_rows(self, indices):
        return self.rows[list(indices)].tolist()

    def score(self, model, indices):
        self.calls.append(list(indices))
        rows = self.rows[list(indices)]
        chances = logits(model, rows[:, :-1])[:, -1].softmax(-1)
        return chances.gather(1, rows[:, -1:])[:, 0].tolist()
