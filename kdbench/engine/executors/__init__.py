"""Executors, registered like methods: each starts `kdbench.engine.worker` with a store and the keys of stages."""
