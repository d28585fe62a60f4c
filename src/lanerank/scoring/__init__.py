"""Scorers: the models that turn a request into scores. With `checkpoint` the only users of torch."""
