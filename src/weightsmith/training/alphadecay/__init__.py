"""AlphaDecay: each weight matrix gets its own weight decay, from how heavy the tail of its spectrum is.

Problem  One weight decay for all matrices over-regularises those whose spectrum is already heavy-tailed
         (queries and keys) and under-regularises the others (the MLP).
Rule     decay_i = eta (s1 + (s2 - s1) (alpha_i - alpha_min) / (alpha_max - alpha_min)), where alpha_i is the
         Hill exponent of matrix i's spectrum (`weightsmith.tensors.esd`); again every `interval` optimiser
         steps.
Source   He et al., arXiv:2506.14562, eq. (2), (3), Algorithm 1; App. A.3 for the other assignments. Public
         code: github.com/hed-ucas/AlphaDecay.
Differs  All matrices of the repeated blocks take part (the public code drops the first and last linear layer
         of the model: `compat="author"`); the rest keeps the decay its group has (there: eta,
         `decay_rest="base"`). Equal exponents give eta (there: the upper end). A refresh happens before the
         optimiser steps 0, interval, 2 interval (there: one step earlier). Rank-deficient matrices get eta
         and set no bound.
Cost     A refresh is one Gram matrix and one eigenvalue problem a matrix: about 4 s on one core for a 60 M
         model, shared between ranks. Between refreshes: a call a matrix; with decoupled decay on an
         accelerator, or in an optimiser of another library, the multiplication that it would do itself.

options      every setting, and the rule from exponents to factors of the base decay
matrices     which parameters take part, and why the others don't
exponents    exponents of all of them, on one device or shared between ranks
controller   `AlphaDecay`: hooks into an optimiser
callback     the same for the Hugging Face Trainer
plot         exponents and decays over time
"""
