"""MEAP: a causal model reads some of its input as a mask symbol and predicts the clean text all the same."""
