"""Pure decisions: which node gets which layers. No I/O, no clock."""
