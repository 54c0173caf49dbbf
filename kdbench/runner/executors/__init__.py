"""Engines that run stages: each starts `kdbench.runner.worker` with a store and a key."""
