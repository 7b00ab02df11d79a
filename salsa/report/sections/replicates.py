"""What each verdict is decided on: the numbers of every claim in every replicate."""

from salsa.report import claims
from salsa.report.sections import Section


def caption(study, tables):
    count, looked = tables["replicates"]["claim"].nunique(), ", at each look by looks.csv" * bool(study.config.looks)
    return (
        f"What the verdicts are decided on: {count} claims in {len(study.replicates)} replicates. A verdict follows "
        "from the column effect of a claim's primary outcome alone: its mean, a t interval at the level of claims.csv "
        f"from the larger of its variance and sampling_variance, and smallest_effect_shown{looked}; secondary outcomes "
        "are in the CSV. The scores of single responses behind them are in prompt_scores.csv.gz, and judges' verdicts "
        "in prompt_win_rates.csv.gz."
    )


SECTION = Section(
    name="replicates",
    heading="Claims",
    place=3,
    table=claims.replicates,
    rows=claims.primary_rows,
    left_out=("outcome", "judge"),
    caption=caption,
)
