"""The train stage: from a latent cache to a run folder with checkpoints, metrics and EMA weights."""
