"""Measure models on data: scores as the official scripts compute them, from this project's own code."""
