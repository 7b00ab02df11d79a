"""The reward model: the proxy that PPO maximises, trained on preference pairs with TRL's RewardTrainer.

Preferences are read from the data, or sampled: two responses to a prompt, drawn equally from sft0 and sft1, of which
gold prefers one with Bradley-Terry noise. The model starts from sft0. Its reward is shifted and scaled by constants
that are fitted once, on samples of sft0, so that a kl_coef means the same in every arm. The reward model of a judge is
trained alike, on preferences that PPO's never sees: `sampled_for_judge` and `given_for_judge`.

With reward_model.models=M it is the weight average of M members (WARM, 2401.12187): the mean of their weights, each
trained on the same pairs from the same start, the new head included, in an order of its own. Constants and quality are
then those of the average. WARM differs in how the members differ: its have learning rates, dropout and SFT checkpoints
of their own (Baklava), and begin with a head that was first trained alone (linear probing), where ours share a random
one.
"""

import shutil

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from scipy.special import expit
from tqdm import tqdm
from transformers import set_seed
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from salsa import soup
from salsa.data import chat
from salsa.data import gold as gold_data
from salsa.rl import divergence, forward, models, training
from salsa.rl.rollout import sample_in_batches
from salsa.workflow import runs, stages
from salsa.workflow.messages import UserError

VERSION = 2
FOR_JUDGE = "_for_judge"
ROUNDING = 1e-6  # of float32: a standard deviation below this share of the scores counts as 0


def train(settings, parents, output, execution):
    """Write the reward model to `output/model`, its constants to normalisation.json, its quality to evaluation.json.

    Parents: `prepare`, `sft0`, `sft1` where preferences are sampled, and `reward_model/<i>` for each of the
    reward_model.models that are averaged, where they are several. Raises UserError where there are too few pairs or
    prompts, where training or scores are not finite, and where the reward has no spread.
    """
    members = _members(settings, parents)
    device = models.prepare_process(execution)
    tokenizer = models.load_tokenizer(models.model_folder(parents["sft0"]))
    if tokenizer.pad_token_id in chat.folder_end_ids(models.model_folder(parents["sft0"]), tokenizer):
        raise UserError("the tokenizer pads with its end token; a reward model could not see where a text ends")
    prompts = _check_sizes(settings, parents, tokenizer)
    # The first process makes the pairs for all: on GPUs of their own, they would round their samples differently.
    pairs = _pairs(settings, parents, tokenizer, device, execution) if training.world()[1] == 0 else None
    held_out, train_pairs, counts = broadcast_object_list([pairs])[0]
    if not members:
        _fit(settings, parents, tokenizer, train_pairs, output, device, execution)
    elif training.world()[1] == 0:
        _average(members, output)
    clear_device_cache(garbage_collection=True)  # trainers refer to themselves, and so keep their models in memory
    if training.world()[1]:
        return None  # the first process measures and writes

    chat.copy_end_ids(models.model_folder(parents["sft0"]), output / "model")
    model = models.load_score_model(output, device, normalised=False)
    try:
        quality = _quality(model, held_out, tokenizer, execution)
        constants = normalise(model, settings, prompts, parents, tokenizer, device, execution)
    except divergence.NotFinite as error:
        rate = f"reward_model.learning_rate={settings.reward_model.learning_rate:g}"
        divergence.stop(output, f"{rate}: {error}; lower it", {}, error.tensors)
    evaluation = {**quality, "pairs": len(train_pairs), "counts": counts}
    if members:
        evaluation["members"] = [_measured(member) for member in members]
    runs.write_json(output / "evaluation.json", evaluation)
    runs.write_json(output / "normalisation.json", constants)
    return evaluation


def _members(settings, parents):
    """The folders of the runs whose models are averaged; none where the model is trained.

    Raises UserError unless the parents are those that reward_model.models asks for.
    """
    count = settings.reward_model.models
    wanted = [f"reward_model/{i}" for i in range(count)] if count > 1 else []
    if {role for role in parents if role.startswith("reward_model/")} != set(wanted):
        needed = f"{wanted[0]} to {wanted[-1]}" if wanted else "no reward_model/I"
        raise UserError(f"reward_model.models={count}: its parents are {needed}; give these with --parent")
    return [parents[role] for role in wanted]


def _average(members, output):
    """Write the mean of the members' weights, in float32, to `output/model`."""
    shutil.rmtree(output / "model", ignore_errors=True)  # of a run that was killed while it measured
    weights = [f"1/{len(members)}"] * len(members)
    soup.soup([models.model_folder(member) for member in members], weights, output / "model")


def _measured(member):
    """What a member's own run measured of it, on the held-out pairs that the average draws again."""
    evaluation = runs.read_json(member / "evaluation.json")
    return {name: evaluation[name] for name in ("held_out_accuracy", "gold_agreement")}


def _check_sizes(settings, parents, tokenizer):
    """Check sizes before anything is sampled. Returns (rows, token ids) of the prompts that fit the constants.

    Raises UserError where the processes can't share a batch, and where too few prompts fit to see the reward's spread.
    """
    reward = settings.reward_model
    training.batch_share("reward_model", reward)
    models.adapter_config("reward_model", reward, score=True)  # raises where PEFT is missing
    rows = runs.read_jsonl(parents["prepare"] / "prompts.jsonl")
    rows, encoded, _ = chat.fitting(tokenizer, rows, settings.lengths.prompt, "PPO prompts")
    count = reward.normalisation_prompts
    rows, encoded = rows[:count], encoded[:count]
    if len(rows) < 2:
        raise UserError(
            f"{len(rows)} prompt of PPO's for reward_model.normalisation_prompts={count}: the reward of one response "
            "has no standard deviation; take more"
        )
    return rows, encoded


def _pairs(settings, parents, tokenizer, device, execution):
    """The held-out pairs, the training pairs, and counts. Raises UserError where there are too few."""
    reward = settings.reward_model
    gold = gold_data.load(parents["prepare"])
    if settings.preferences.startswith("sampled"):
        pairs, counts = sample_pairs(settings, parents, tokenizer, gold, device, execution)
    else:
        pairs, counts = read_pairs(settings, parents, tokenizer, gold)
    held_out = [pair for pair in pairs if pair["held_out"]]
    train_pairs = [pair for pair in pairs if not pair["held_out"]]
    ppo_pairs = []  # a judge must not learn from the pairs that train PPO's reward model
    if settings.preferences == "given" + FOR_JUDGE:
        ppo_pairs, train_pairs = train_pairs[: reward.pairs], train_pairs[reward.pairs :]
        both = [{tuple(pair["prompt"]) for pair in part} for part in (ppo_pairs, train_pairs[: reward.pairs])]
        counts["shared_prompts"] = len(both[0] & both[1])
    train_pairs = train_pairs[: reward.pairs]
    if not held_out or len(train_pairs) < reward.batch_size:
        after = f" after PPO's {len(ppo_pairs)}" if ppo_pairs else ""
        identical = counts.get("dropped_identical", 0)
        why = f"; {identical} pairs of two equal responses were dropped" if identical else ""
        raise UserError(
            f"{len(held_out)} held-out and {len(train_pairs)} training pairs are left of {counts['read']} rows{after}: "
            f"too few for reward_model.held_out={reward.held_out} and reward_model.batch_size={reward.batch_size}{why}"
        )
    return held_out, train_pairs, counts


def _fit(settings, parents, tokenizer, pairs, output, device, execution):
    """Train on pairs, and write `output/model`."""

    def load():
        return models.new_classifier(models.model_folder(parents["sft0"]), tokenizer.pad_token_id)

    set_seed(settings.seed)  # for the weights of the new head, which all members of an average share
    trainer = _trainer(settings, load(), tokenizer, pairs, output, device, execution)
    training.train(trainer, output, load, execution)


class _Trainer(training.DistributedMixin, RewardTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean over the pairs of a whole batch, for any size of micro-batches and any number of empty pairs."""
        pairs = len(inputs["input_ids"]) // 2
        counted = pairs * self.current_gradient_accumulation_steps * self.args.world_size
        if self.args.world_size == 1 and inputs["input_ids"].device.type == "cpu":
            model = _ByLength(model)
        return super().compute_loss(model, inputs) * (counted / self.in_this_step())


class _ByLength:
    """A classifier that computes each response with those of like length, and so less padding."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, attention_mask, **options):
        parts, logits = forward.of_like_length(attention_mask.sum(dim=1)), []
        for rows in parts:
            columns = attention_mask[rows].any(dim=0)
            part = {"input_ids": input_ids[rows][:, columns], "attention_mask": attention_mask[rows][:, columns]}
            logits.append(self.model(**part, **options).logits)
        return SequenceClassifierOutput(logits=forward.in_order(logits, parts))


def _trainer(settings, classifier, tokenizer, pairs, output, device, execution):
    # The members of an average share all random numbers but the order of the pairs.
    order = runs.derive_seed(settings.seed, "order", settings.member) if settings.member else None
    padding = [tokenizer.pad_token_id]  # as both responses of a pair, it gives no gradient
    return _Trainer(
        model=classifier,
        args=RewardConfig(
            **training.arguments("reward_model", settings.reward_model, settings, execution, output, device),
            data_seed=order,  # None: the seed itself
            max_length=None,  # pairs that are too long are dropped and counted when they are made
        ),
        train_dataset=Dataset.from_dict(
            {
                "chosen_ids": [pair["prompt"] + pair["chosen"] for pair in pairs],
                "rejected_ids": [pair["prompt"] + pair["rejected"] for pair in pairs],
            }
        ),
        processing_class=tokenizer,
        peft_config=models.adapter_config("reward_model", settings.reward_model, score=True),
        section="reward_model",
        empty={"chosen_ids": padding, "rejected_ids": padding},
    )


def sample_pairs(settings, parents, tokenizer, gold, device, execution):
    """Pairs of responses drawn from sft0 and sft1 in turn (00, 01, 11, 10), labelled by noisy gold.

    Returns (pairs, counts). A pair is {"prompt", "chosen", "rejected"} (token ids) with gold of both responses. The
    held-out pairs come first, and no training pair has their prompts. Prompts of training pairs are used again, with
    other noise, where there are fewer prompts than pairs. Pairs of two identical texts are dropped.

    A judge's training pairs begin with the last prompt and go backwards, and its noise has another seed;
    `shared_prompts` counts the prompts that PPO's reward model is trained on, too.
    """
    reward = settings.reward_model
    rows = runs.read_jsonl(parents["prepare"] / "preference_prompts.jsonl")
    read = len(rows)
    rows, encoded, refused = chat.fitting(tokenizer, rows, settings.lengths.prompt, "preference prompts")
    if len(rows) <= reward.held_out:
        raise UserError(f"{len(rows)} preference prompts for reward_model.held_out={reward.held_out}; give more")
    train_prompts = [reward.held_out + i % (len(rows) - reward.held_out) for i in range(reward.pairs)]
    ppo_prompts = set(train_prompts)
    if settings.preferences.endswith(FOR_JUDGE):
        train_prompts = [len(rows) - 1 - (place - reward.held_out) for place in train_prompts]
    order = [*range(reward.held_out), *train_prompts]  # the prompt of each pair
    prompts = [(rows[i]["id"], encoded[i]) for i in order]
    responses = draw_pairs(settings, parents, tokenizer, prompts, device, execution)
    texts = [[chat.text_of(tokenizer, ids) for ids in pair] for pair in responses]
    conversations = [rows[i]["prompt"] for i in order]
    golds = [gold.score(conversations, [pair[place] for pair in texts]) for place in (0, 1)]
    labelled, dropped = label_pairs(tokenizer, responses, golds, reward.gold_temperature, settings.seed)
    pairs = [
        {
            "prompt": encoded[order[i]],
            "chosen": responses[i][best],
            "rejected": responses[i][worst],
            "gold": (float(golds[best][i]), float(golds[worst][i])),
            "held_out": i < reward.held_out,
        }
        for i, best, worst in labelled
    ]
    counts = {"read": read, "sampled": len(order), "kept": len(pairs)} | dropped | refused
    if settings.preferences.endswith(FOR_JUDGE):
        counts["shared_prompts"] = len(ppo_prompts & set(train_prompts))
    return pairs, counts


def label_pairs(tokenizer, responses, scores, temperature, seed):
    """Decide which response of each pair (token ids) is preferred: P(first) = σ((first − second score) / temperature).

    Returns the (place, best, worst) of each pair that can be learned from, and how many others were dropped, and why.
    `scores` are two arrays (N,), of the first responses and of the second ones.
    """
    preferred = expit((scores[0] - scores[1]) / temperature) > np.random.default_rng(seed).random(len(responses))
    identical = [len({chat.text_of(tokenizer, ids) for ids in pair}) == 1 for pair in responses]
    # The classifier reads its score at the last token that is not padding. A response that was cut may end with it.
    padded = [any(ids[-1] == tokenizer.pad_token_id for ids in pair) for pair in responses]
    labelled = [
        (i, 0, 1) if first else (i, 1, 0) for i, first in enumerate(preferred) if not identical[i] and not padded[i]
    ]
    dropped = {"dropped_identical": sum(identical)}
    if others := len(responses) - len(labelled) - sum(identical):
        dropped["dropped_ends_in_padding"] = others
    return labelled, dropped


def draw_pairs(settings, parents, tokenizer, prompts, device, execution):
    """Two responses (token ids) to each prompt (id, token ids), drawn from sft0 and sft1 in turn: 00, 01, 11, 10.

    A prompt that stands there twice gets other noise the second time.
    """
    sources = [((0, 0), (0, 1), (1, 1), (1, 0))[i % 4] for i in range(len(prompts))]
    responses = [[None, None] for _ in prompts]
    for which in (0, 1):
        model = models.load_policy(models.model_folder(parents[f"sft{which}"]), device)
        for place in (0, 1):
            mine = [i for i, source in enumerate(sources) if source[place] == which]
            ids, encoded = [f"{prompts[i][0]}/{i}" for i in mine], [prompts[i][1] for i in mine]
            seed = runs.derive_seed(settings.seed, "preferences", place)
            length, size = settings.lengths.response, execution.rollout_batch
            batches = sample_in_batches(model, tokenizer, encoded, ids, seed, length, size)
            for indices, sequences in tqdm(batches, desc=f"sft{which}", mininterval=5):
                for index, response in zip(indices, sequences.response_ids(), strict=True):
                    responses[mine[index]][place] = response
    return responses


def read_pairs(settings, parents, tokenizer, gold):
    """The pairs of preferences.jsonl as token ids, and counts; drops those that are too long or can't be encoded."""
    rows = runs.read_jsonl(parents["prepare"] / "preferences.jsonl")
    end = chat.ending(tokenizer, chat.folder_end_ids(models.model_folder(parents["sft0"]), tokenizer))

    def encode(row):
        prompt, chosen = chat.encode_conversation(tokenizer, row["prompt"] + row["chosen"], end)
        return prompt, chosen, chat.encode_conversation(tokenizer, row["prompt"] + row["rejected"], end)[1]

    encoded, refused = chat.accepted(rows, encode)
    pairs, lengths = [], settings.lengths
    for row, (prompt, chosen, rejected) in encoded:
        if len(prompt) <= lengths.prompt and max(len(chosen), len(rejected)) <= lengths.response:
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "gold": None}
            pair["held_out"] = len(pairs) < settings.reward_model.held_out
            if gold:
                texts = [row[side][-1]["content"] for side in ("chosen", "rejected")]
                pair["gold"] = tuple(gold.score([row["prompt"]] * 2, texts))
            pairs.append(pair)
    counts = {"read": len(rows), "kept": len(pairs), "dropped_too_long": len(encoded) - len(pairs)}
    return pairs, counts | chat.counted(refused, "preferences")


@torch.no_grad()
def _quality(model, pairs, tokenizer, execution):
    """Held-out accuracy for the (noisy) labels, and agreement with the order of gold, where there is gold."""
    device = next(model.parameters()).device
    scores = []
    for side in ("chosen", "rejected"):
        sequences = forward.from_lists(
            [pair["prompt"] for pair in pairs], [pair[side] for pair in pairs], [], tokenizer.pad_token_id, device
        )
        scores.append(_finite_scores(model, sequences, execution, "held-out responses").cpu().numpy())
    right = scores[0] > scores[1]
    quality = {"held_out": len(pairs), "held_out_accuracy": float(right.mean()), "gold_agreement": None}
    if pairs[0]["gold"] is not None:
        difference = np.array([pair["gold"][0] - pair["gold"][1] for pair in pairs])
        decided = difference != 0
        if decided.any():
            quality["gold_agreement"] = float((right == (difference > 0))[decided].mean())
    return quality


def _finite_scores(model, sequences, execution, what):
    """The rewards (B,) of responses. Raises NotFinite where one is not finite."""
    scores = model.scores(sequences, execution.micro_batch)
    fault = divergence.first({f"the score of {what}": scores})
    if fault:
        raise divergence.NotFinite(fault, {**vars(sequences), "score": scores})
    return scores


def normalise(model, settings, prompts, parents, tokenizer, device, execution):
    """Mean and standard deviation of the reward over samples of sft0 for some of PPO's prompts (rows, token ids).

    Raises UserError where the reward has no spread: scores can't be divided by it, and PPO could learn nothing from it.
    """
    rows, encoded = prompts
    policy = models.load_policy(models.model_folder(parents["sft0"]), device)
    ids, seed = [row["id"] for row in rows], runs.derive_seed(settings.seed, "normalisation", 0)
    length, size = settings.lengths.response, execution.rollout_batch
    scores, responses = [], set()
    for _, sequences in sample_in_batches(policy, tokenizer, encoded, ids, seed, length, size):
        scores += _finite_scores(model, sequences, execution, "sft0's samples").tolist()
        responses |= set(map(tuple, sequences.response_ids()))
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if std <= ROUNDING * np.abs(scores).max():
        cause = "sft0 says the same to all of them" if len(responses) == 1 else "the reward model says the same of all"
        raise UserError(
            f"the standard deviation of the reward on {len(scores)} samples of sft0 is {std:.3g} (mean {mean:.3g}): "
            f"{cause}, and a policy could learn nothing; look at sft0, reward_model.learning_rate and the pairs"
        )
    return {"mean": mean, "std": std, "samples": len(scores)}


if __name__ == "__main__":
    stages.REWARD_MODEL.command(train, VERSION, __doc__)
