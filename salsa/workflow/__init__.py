"""The machinery around the pipeline: configuration, plan, runs, and what starts them."""
