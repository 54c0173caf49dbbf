"""Runs: from a request on the command line to records in a results folder."""
