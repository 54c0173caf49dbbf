"""Benchmark files that ship with kdbench (`suites/`), and the speed benchmarks (`speed/`, not installed)."""
