"""Worlds, one file each: what SFT, the reward model and the policies learn from (`salsa.data.World`)."""
