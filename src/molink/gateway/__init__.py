"""The HTTP edge: what a user of the cluster can reach."""
