"""LightSAM, SAM and ASAM, optimisers that look at the loss around the weights:
`from weightsmith.training import LightSAM`.
"""
