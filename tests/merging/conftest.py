"""A base and three fine-tunes of it, on disk."""

import pytest

from .made import random_model, save


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Folders base, m1, m2, m3 in bfloat16."""
    root = tmp_path_factory.mktemp("family")
    base = random_model(0)
    save(root / "base", base)
    for index in (1, 2, 3):
        save(root / f"m{index}", random_model(index, near=base))
    return root


@pytest.fixture(scope="session")
def exact_family(tmp_path_factory):
    """The same in float32."""
    root = tmp_path_factory.mktemp("exact")
    base = random_model(0)
    save(root / "base", base, "F32", {"torch_dtype": "float32"})
    for index in (1, 2, 3):
        save(root / f"m{index}", random_model(index, near=base), "F32", {"torch_dtype": "float32"})
    return root
