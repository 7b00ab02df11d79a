"""What a policy can start from and be held to: one file a kind of reference."""
