"""Callbacks: progress on the terminal, result files, TensorBoard."""

from fedlscl.federated.state import Callback

__all__ = ["Callback"]
