"""The ways to train a policy: one file each."""
