"""One model from several states of one run: SeWA and its peers.

Problem  The last state of a run is noisy. A mean of many is better, unless some of them are bad (spikes, a
         high learning rate, reinforcement learning): then which ones are averaged decides.
Method   SeWA learns a mask over N candidates that keeps K of them, by descent on the loss of the mean itself:
         the mask is relaxed (binary Concrete), the gradient of each entry is one dot product of the loss
         gradient with that candidate, and no graph runs through the N models. Peers: mean of all (`uniform`,
         which is SWA over the window), of the latest (`lawa`), of evenly spread ones (`every`), of random
         ones (`random`), of the K best alone (`best`), a greedy soup (`greedy`), and running means (`swa`,
         `ema`).
Source   Wang et al., arXiv:2502.10119 (SeWA; no public code); Izmailov et al., arXiv:1803.05407 (SWA);
         Kaddour, arXiv:2209.14981 (LAWA); Wortsman et al., arXiv:2203.05482 (greedy soup).
Decided  The paper leaves open and this decides, each as an option: the mean divides by the sum of the relaxed
         mask (dividing by K rescales the network at random); Adam on the mask with projection onto sum <= K;
         temperature 1 to 0.1; the criterion is held-out loss where a held-out set is given, else the training
         loss (the paper's), which can overfit.
Cost     One iteration is one forward and backward pass, one weighted sum and N dot products over the
         candidates: reading them once each, from memory or from their folders. The candidates of a run cost N
         copies of the trained weights on disk.

options      every setting
choice       rules that need no model, and what a choice is
masks        the learned mask, on vectors
bank         candidates in memory        folders     candidates in checkpoint folders, read in tiles
objective    loss and gradient at a mixture of candidates
sewa         SeWA on a model             search      best and greedy
running      SWA and EMA during training
streaming    the mean of folders as a new folder, without torch
run          all of it for a list of folders
callback     all of it for the Hugging Face Trainer
"""
