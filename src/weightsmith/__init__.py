"""Weightsmith: train, merge, compress and check the weights of neural networks.

Importing the package costs nothing: torch and transformers load only when a part that needs them is used.
"""

__version__ = "0.1.0"
