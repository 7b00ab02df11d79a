"""What is measured of policies: responses, scores, verdicts, statistics."""
