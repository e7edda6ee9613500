"""Quantised weights: formats and the linear layers that compute with them, put into a model from outside."""
