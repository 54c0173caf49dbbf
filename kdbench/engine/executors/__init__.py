"""Engines that run stages: each starts `kdbench.engine.worker` with a store and a key."""
