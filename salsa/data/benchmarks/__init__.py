"""Benchmarks, one file a kind: prompts that no training sees (`salsa.data.Benchmark`)."""
