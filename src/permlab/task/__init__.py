"""Tasks: what is asked of a model and its method, and how they are trained for it."""
