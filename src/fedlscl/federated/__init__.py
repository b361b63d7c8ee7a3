"""Algorithm 1: clients, methods, the trainer and what it measures."""
