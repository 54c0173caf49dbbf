"""The tables of the boards."""
