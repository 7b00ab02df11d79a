"""What the ways to train share: models, forward passes, sampling, the objective, processes, checkpoints."""
