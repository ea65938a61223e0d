"""The head of a model, deferred until its logits are read."""
