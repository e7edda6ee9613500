"""Training: recipes, methods, and the one loop that all of them share."""
