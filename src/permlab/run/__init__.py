"""One run, told without knowing any task."""
