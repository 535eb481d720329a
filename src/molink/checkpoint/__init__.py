"""A model on disk and on the hub: what it is, which files hold which layers."""
