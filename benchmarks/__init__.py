"""Suite files that ship with kdbench (`suites/`, `defaults.toml`), and the speed benchmarks (`speed/`, not installed)."""
