"""Parts of `benchmarks.study`."""
