"""What judges share: the comparisons they are asked, how verdicts are kept, and verdicts that come from scores."""
