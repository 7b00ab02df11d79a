"""Reward over the plane through sft0, sft1 and a trained policy, and along sft0 -> policy beyond both ends."""

from salsa import config, runs

VERSION = 1


def survey(settings, parents, output, execution):
    """Write plane.csv."""
    raise NotImplementedError


if __name__ == "__main__":
    runs.command(
        "plane",
        VERSION,
        survey,
        config.PlaneSettings,
        roles=("prepare", "reward_model", "sft0", "sft1", "ppo"),
        description=__doc__,
    )
