"""Suites: typed, read from TOML with the line of every mistake, and tried before any training."""
