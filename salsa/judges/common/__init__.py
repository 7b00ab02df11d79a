"""What judges share: comparisons, the files that keep verdicts, and judges that compare scores."""
