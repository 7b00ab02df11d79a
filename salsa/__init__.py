"""SALSA: PPO anchored to a soup of SFT models, and the controls that tell why it works."""

__version__ = "0.1.0"
