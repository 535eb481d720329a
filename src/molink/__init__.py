"""MoLink serves one language model over machines that nobody would call a cluster."""

__version__ = "0.1.0"
