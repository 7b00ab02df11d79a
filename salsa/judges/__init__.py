"""Who says which of two responses is better: one file a kind."""
