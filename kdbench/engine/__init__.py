"""The engine: plans of stages, the store, the scheduler, workers and executors."""
