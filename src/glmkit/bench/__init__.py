"""Measures speed and memory of models at their real shapes, and what the machine could do at best: `glm bench`."""
