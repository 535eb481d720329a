"""Pure decisions about requests: who is next, and where it goes. No I/O, no clock."""
