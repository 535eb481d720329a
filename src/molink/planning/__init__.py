"""Pure decisions: which node gets which layers, and what a step takes. No I/O, no clock."""
