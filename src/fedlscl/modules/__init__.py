"""LightningModules, one local objective each."""
