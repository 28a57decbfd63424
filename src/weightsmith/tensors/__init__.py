"""Arithmetic on one parameter's tensors. Nothing is imported here: take what you need from the modules.

`floats` casts between stored dtypes and float32 without torch; `selection` picks exact quantiles and tops;
`spectra` computes singular values (torch).
"""
