"""What a look decides: a study with `looks` goes on only while a claim of the abstract is undecided.

It reads the table of claims and tests nothing itself. Left out: which runs a look has (workflow/plan.py), and what
Snakemake does after it (workflow/rules/common.smk).
"""

from salsa.evaluate.decisions import NOT_TESTED, UNDECIDED

PRIMARY = "abstract"  # the origin of the claims that a study is run for


def decision(study, claims):
    """What `decision.json` says of a look, as a dictionary.

    Args:
        claims: the table of claims, whose rows of one claim have one `claim_verdict`.

    Keys: look, from 1 on; replicates, how many it rests on; decided and undecided, the tested claims of the abstract by
    name; goes_on, whether further replicates can decide one that is undecided, and another look is to come. They can't
    where a replicate of it has no finite number, or its looks contradict each other.
    """
    looks, count = study.config.looks, len(study.config.replicates)
    primary = claims[(claims["origin"] == PRIMARY) & (claims["claim_verdict"] != NOT_TESTED)]
    verdicts = dict(zip(primary["claim"], primary["claim_verdict"], strict=True))
    undecided = [name for name, verdict in verdicts.items() if verdict == UNDECIDED]
    deciding = primary[(primary["outcome"] == "primary") & primary["claim"].isin(undecided)]
    hopeless = (deciding["lost"] > 0) | deciding["contradictory"].astype(bool)
    return {
        "look": looks.index(count) + 1,
        "replicates": count,
        "decided": [name for name in verdicts if name not in undecided],
        "undecided": undecided,
        "goes_on": not hopeless.all() and count < looks[-1],
    }
