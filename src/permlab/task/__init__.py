"""Tasks: what is trained, with which loss and which metrics."""
