"""SALSA: PPO anchored to a soup of SFT models, and the controls that tell a soup's effect from others."""

__version__ = "0.1.0"
