"""Scorers: the models that turn a request into scores. Torch is used here and in `checkpoint`."""
