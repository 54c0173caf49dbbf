"""From a benchmark file to results: plan, store, workers."""
