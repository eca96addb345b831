"""Pictures that runs of this task alone have."""
