"""One machine: its agent, its supervisor and the host process of a stage."""
