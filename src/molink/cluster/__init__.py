"""The coordinator: membership, its events and state, and which plan is in force."""
