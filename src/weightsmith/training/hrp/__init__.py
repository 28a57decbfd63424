"""HRP: the direction in which a small LoRA starts, learnt by a large one."""
