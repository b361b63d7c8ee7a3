"""Algorithm 1 of arXiv 2508.09489: methods, clients, the trainer, validation, checkpoints and metrics."""
