"""Tiny models, one warm server that forks processes to be killed, and scripts in several gloo processes."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightsmith.testbed import model_config, write_model_folder

RANKS = Path(__file__).parent / "ranks"


@pytest.fixture(scope="session")
def forks():
    """A server that has imported everything once; each process of it starts in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "weightsmith.training.trainer", "weightsmith.training.loop"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


@pytest.fixture(scope="session")
def config_folder(tmp_path_factory):
    """A folder like the bed's, with a Llama of a few thousand parameters and no weights."""
    import json

    folder = write_model_folder("xs", tmp_path_factory.mktemp("config"))
    small = {
        "num_hidden_layers": 3,
        "hidden_size": 16,
        "intermediate_size": 24,
        "max_position_embeddings": 96,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps({**model_config("xs"), **small, **heads}))
    return folder


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """A random GPT-2 with dropout and a tokenizer of its own, trained here; tied embeddings, stored in
    bfloat16."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    from weightsmith.testbed import text

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text("docs", "test")], vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory):
    """`run_ranks("alphadecay.py")` -> what each of two processes of `ranks/alphadecay.py` found."""

    def run(script, world=2):
        import torch

        out = tmp_path_factory.mktemp(Path(script).stem)
        # Files: of two pipes the one that is not read yet could fill up.
        logs = [out / f"rank{rank}.log" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RANKS / script), str(out)],
                        env={**os.environ, **ranks},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            for process in processes:
                process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
        statuses = [process.wait() for process in processes]
        said = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
        assert statuses == [0] * world, f"{statuses}\n{said}"
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return run
