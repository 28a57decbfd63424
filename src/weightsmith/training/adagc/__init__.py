"""AdaGC, adaptive per-tensor gradient clipping: `from weightsmith.training import AdaGC`."""
