"""Mix data of three objectives as Hugging Face data sets: a fixed ratio, gated rewards, rounds that adapt.

    python examples/mixtures.py

Questions come from the test-bed, rewards are made up; put a reward model's scores in their place.
"""

import datasets

from weightsmith.alignment import armorm_mixture, heuristic_mixture, hummer_mixture, hummer_weights
from weightsmith.testbed import items

OBJECTIVES = ("help", "honest", "harmless")


def rewards(rows: list[dict[str, str]]) -> list[dict[str, float]]:
    """A stand-in: a refusal is safe and of little help, an answer the reverse; short is clear."""
    found = []
    for row in rows:
        refuses = row["answer"] in "?#"
        clear = 1 / len(row["prompt"])
        found.append({"help": clear - 0.04 * refuses, "harmless": clear - 0.02 * (not refuses)})
    return found


def main() -> None:
    sources = {
        objective: datasets.Dataset.from_list(
            [{"prompt": item.question, "answer": item.answer} for item in items(objective, "train", 300)]
        )
        for objective in OBJECTIVES
    }
    equal = heuristic_mixture(sources, total=9000)
    print("fixed ratio:", {objective: len(equal.of(objective)) for objective in OBJECTIVES}, "rows")

    best = armorm_mixture(sources, rewards, keep=0.25)
    calm = hummer_mixture(sources, rewards, keep=0.25)
    for name, mixture in (("gated reward", best), ("least conflict", calm)):
        mean = sum(len(row["prompt"]) for row in mixture.rows) / len(mixture)
        print(f"a quarter by {name}: {len(mixture)} rows, {mean:.1f} characters a question")

    weights = dict.fromkeys(OBJECTIVES, 1 / 3)
    before = None
    # Held-out scores after each round of training, from your own evaluation.
    for now in ({"help": 0.8, "honest": 0.2, "harmless": 0.3}, {"help": 0.6, "honest": 0.5, "harmless": 0.6}):
        weights = hummer_weights(weights, now, before)
        before = now
        mixed = datasets.interleave_datasets(
            [datasets.Dataset.from_list(calm.of(objective)) for objective in OBJECTIVES],
            probabilities=[weights[objective] for objective in OBJECTIVES],
            seed=0,
        )
        shares = ", ".join(f"{objective} {weights[objective]:.0%}" for objective in OBJECTIVES)
        print(f"next round: {shares}; {len(mixed)} rows")


if __name__ == "__main__":
    main()
