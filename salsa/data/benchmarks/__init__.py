"""Benchmarks, one file per kind: prompts that no training sees (`salsa.data.Benchmark`)."""
