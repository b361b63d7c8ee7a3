"""The command line over LightningCLI: ``app`` is where it starts."""

COMMANDS = ("fit", "validate", "test", "predict", "report", "methods", "doctor", "completion")
