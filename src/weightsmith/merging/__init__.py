"""Several checkpoints into one."""
