"""One sentence for each table and figure of a study, which states what its numbers say."""

from salsa.report import judging, selection, tables


def captions(study, frames, kl_coefs):
    """name -> one sentence for each table and figure, in the order of the report.

    Args:
        frames: table name -> data frame.
        kl_coefs: those that curves show.
    """
    count = len(study.replicates)
    replicates = f"{count} replicate" + "s" * (count != 1)
    band = "95 % t intervals over replicates" if count > 1 else "no interval: conditional on one SFT pair"
    last = tables.final(frames["frontier"])
    drawn = [policy for policy in study.policies if policy.kl_coef in kl_coefs]
    coefs = ", ".join(f"{kl_coef:g}" for kl_coef in kl_coefs)
    return {
        "claims": _claims(frames["claims"]),
        "arms": f"{len(frames['arms'])} arms: where the policy starts, what its KL penalty is measured from, and the "
        "penalty's strength, kl_scale times the study's kl_coef, over the run as the schedule says; the kl_coef that "
        "tables and figures show is the study's, before the scale.",
        "gates": f"Gates of {replicates}: KL(sft0 ‖ soup) {_range(frames['gates']['kl_sft0_soup'])} nats a response, "
        f"reward model's agreement with gold {_range(frames['gates']['gold_agreement'])} on held-out pairs and "
        f"{_range(frames['gates']['policy_gold_agreement'])} between final policies.",
        "chosen": _chosen(frames["chosen"]),
        "paper_table": _preferences(study, frames["paper_table"], "salsa", band) + doubts(study),
        "ablations": _preferences(study, frames["ablations"], "arm", band) + doubts(study),
        "win_rates": _win_rates(frames["win_rates"], replicates, no_verdicts(study)) + doubts(study),
        "sources": f"Where verdicts lie, in {len(frames['sources'])} rows: each names a file of a judge run, below the "
        "results folder, which `python -m salsa.evaluate.statistics FILE --candidate CANDIDATE_MODEL --baseline "
        "BASELINE_MODEL` counts again; a row of another table rests on the files of its judge, arms and kl_coef.",
        "judges": _judges(frames["judges"]) + doubts(study),
        "judge_pairs": _judge_pairs(frames["judge_pairs"]),
        "bradley_terry": _bradley_terry(frames["bradley_terry"], no_verdicts(study)) + doubts(study),
        "rewards": f"Mean over {replicates} on the evaluation prompts ({band}); sft0, sft1 and their soup before PPO.",
        "frontier": f"{len(last)} final policies of {replicates}: KL(policy ‖ sft0) from {_range(last['kl_to_sft0'])} "
        f"nats a response, gold reward {_range(last['gold_reward'])}, proxy reward {_range(last['reward'])}; KL to the "
        "own reference is not comparable between references.",
        "matched_kl": _matched(frames["matched_kl"], study.plain, band),
        "over_optimisation": "Proxy and gold reward over training against KL to sft0, as shares of the largest gain of "
        "any arm: where gold turns down while the proxy rises, the proxy is over-optimised.",
        "stability": _stability(study, frames["stability"], band),
        "alpha_curve": "Reward, and the soups' validation loss, from sft0 (alpha 0) to sft1 (alpha 1), before PPO at "
        f"{(frames['alpha_curve']['kind'] == 'sft_soup').sum()} soups and after it at "
        f"{(frames['alpha_curve']['kind'] == 'policy').sum()} settings of alpha and kl_coef, {replicates}; {band}.",
        "training_curves": f"Training of {len(drawn)} policies (kl_coef {coefs}), sampled before each iteration's "
        f"update: line the mean, band the range over {replicates}; gold reward is that of the kept rollouts.",
        "lengths_and_ends": f"Response length in tokens (kl_coef {coefs}), in training and on "
        f"{len(study.benchmarks)} benchmarks; final policies answer the evaluation prompts in "
        f"{_range(last['response_length'])} tokens on average.",
        "geometry": "Where the policies lie in the space of weights: "
        f"{_range(frames['geometry']['from_sft0'])} from sft0, "
        f"{_range(frames['geometry']['off_line'])} off the line to sft1, which lies "
        f"{_range(frames['geometry']['sft0_to_sft1'])} away, and {_range(frames['geometry']['along_sft1'])} of the way "
        f"along it; means over {replicates}, {band}.",
        "plane": _plane(frames["plane"]),
        "loss_line": "Validation loss along the line between the first two SFT models: the barrier is "
        f"{_range(frames['gates']['barrier'])} nats a token over {replicates}.",
    }


def no_verdicts(study):
    """Why there is no win rate: a sentence."""
    if not judging.asked(study):
        return "No verdicts: this study has no judge."
    return "No verdicts." if not judging.unfit(study) else "No verdicts, as said next."


def doubts(study):
    """What a table of win rates can't be read without: judges that can't measure. Begins with a space, or is ""."""
    return "".join(f" {line[:1].upper()}{line[1:]}." for line in judging.unfit(study))


def _win_rates(frame, replicates, nothing):
    if frame.empty:
        return nothing
    clear, known = int(((frame["ci_low"] > 0.5) | (frame["ci_high"] < 0.5)).sum()), int(frame["ci_low"].notna().sum())
    clear = f"{clear} of {known} intervals exclude ½" if known else "none has an interval, which takes two prompts"
    return (
        f"Adjusted win rates (wins + ties/2) with 95 % intervals that resample {_range(frame['prompts'])} prompts over "
        f"{replicates}, conditional on these models: {clear}; length-controlled: "
        "at answers of one length (2404.04475); Holm's p over all rows against ppo, and over all against sft0."
    )


def _claims(frame):
    if frame.empty:
        return "This study makes no claims."
    verdicts = frame.drop_duplicates("claim")["claim_verdict"].value_counts()
    counts = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    return (
        f"{verdicts.sum()} claims, fixed before the study ran: {counts}; effects are candidate minus baseline with "
        "95 % t intervals over replicates, each arm at its chosen kl_coef, p one-sided and corrected after Holm."
    )


def _chosen(frame):
    if frame.empty:
        return "No two arms to compare."
    same = int((frame["candidate_kl_coef"] == frame["baseline_kl_coef"]).sum())
    return (
        "The kl_coef at which two arms are compared: for each the one that does best on the development prompts "
        f"({frame['by'].iloc[0].replace('_', ' ')}, mean over replicates), of those that both were run at, and of "
        f"equals the largest; {same} of {len(frame)} pairs have one kl_coef for both."
    )


def _preferences(study, frame, subject, band):
    if frame.empty:
        return "No arm here that was judged against plain PPO or sft0."
    named = "SALSA" if subject == "salsa" else "Alphas and controls"
    direct = int((frame["how"] == selection.DIRECT).sum())
    other = (
        f"; {len(frame) - direct} of {len(frame)} cells against PPO are of arms at two kl_coefs, which no judge "
        "compared: ½ plus the difference of their win rates against sft0"
        if direct < len(frame)
        else ""
    )
    return (
        f"{named} against PPO, each at its chosen kl_coef: adjusted win rates of "
        f"{_range(frame[f'{subject}_vs_ppo'])} by benchmark, judge {frame['judge'].iloc[0]}, beside both against sft0; "
        f"{len(study.replicates)} replicates, {band}{other}; measured here, none of them the paper's."
    )


def _judges(frame):
    if frame.empty:
        return "No verdicts: this study has no judge."
    own = frame[(frame["benchmark"] == "all") & (frame["verdicts"] > 0)]
    if own.empty:
        return "No verdicts, as said next."
    gold = own["gold_agreement"].dropna()
    agreed = f"; they agree with gold on a share of {_range(gold)} (win, tie or loss)" if len(gold) else ""
    return (
        f"{len(own)} judge{'s' * (len(own) != 1)} over all benchmarks: the same verdict in both orders on a share of "
        f"{_range(own['swap_consistency'])}, the answer shown first preferred in {_range(own['first_position_share'])} "
        f"of decided verdicts, ties {_range(own['ties'])}{agreed}; discrimination: the share of verdicts that follows "
        "the answers, not places or dice (1 by definition of a judge that scores each answer by itself)."
    )


def _judge_pairs(frame):
    if frame.empty:
        return "No comparison was judged by two judges."
    return (
        "Pairs of judges on what both judged, win, tie or loss: they agree on a share of "
        f"{_range(frame['agreement'])}, Cohen's kappa {_range(frame['kappa'])}."
    )


def _bradley_terry(frame, nothing):
    if frame.empty:
        return nothing
    own = frame.dropna(subset="kl_coef")
    above, below = int((own["score_low"] > 0).sum()), int((own["score_high"] < 0).sum())
    return (
        "Scores of all models on one scale, by judge and over all benchmarks' and replicates' verdicts together: "
        f"log-odds of a win over sft0, ties aside (Davidson 1970); of {len(own)} scores of policies, {above} intervals "
        f"lie above sft0 and {below} below, by resampling prompts, conditional on these models."
    )


def _matched(frame, plain, band):
    if frame.empty:
        return "No arm beside plain PPO was run at two kl_coefs, or none reaches the same KL."
    spread = frame["difference_high"] > frame["difference_low"]  # equal replicates have no interval
    above = int((spread & (frame["difference_low"] > 0)).sum())
    below = int((spread & (frame["difference_high"] < 0)).sum())
    return (
        f"Arms minus {plain} at equal KL to sft0, over the range that the curves through both arms' final policies "
        f"share (no point at sft0 itself, and nothing beyond a curve's ends): of {len(frame)} differences, {above} "
        f"intervals lie above 0 and {below} below; {band}."
    )


def _stability(study, frame, band):
    wanted, count, total = study.config["stability"], int(frame["collapsed"].sum()), frame["replicates"].sum()
    return (
        f"{frame['stable'].sum()} of {total} policies are stable: of their development responses "
        f"at least {wanted['lowest_end_rate']:g} of sft0's share end, they are at least "
        f"{wanted['shortest_length']:g} times as long, and gold of the last kept rollouts is at most "
        f"{wanted['largest_gold_loss']:g} below its peak; {band}. {count} of {total} have "
        "collapsed: they hardly end or write their responses, or write what sft0 would not; both are counted by arm."
    )


def _plane(frame):
    if frame.empty:
        return "No policy spans a plane in this study."
    policies = len(frame[["arm", "kl_coef", "replicate"]].drop_duplicates())
    return (
        f"Rewards at {len(frame)} points of the planes through sft0, sft1 and each of {policies} policies, and along "
        f"sft0 → policy beyond both: proxy reward {_range(frame['reward'])}, gold reward "
        f"{_range(frame['gold_reward'])}, KL from sft0 up to {tables.number(frame['kl_from_sft0'].max())} nats."
    )


def _range(values):
    values = [tables.value(v) for v in values if v == v and v is not None]
    if not values:
        return "unknown"
    low, high = tables.number(min(values)), tables.number(max(values))
    return low if low == high else f"{low} to {high}"
