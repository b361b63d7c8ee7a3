"""The command line over LightningCLI: ``app`` is where it starts."""
