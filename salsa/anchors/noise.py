"""The control: sft0 moved in a random direction until KL(sft0 ‖ reference) is that of the soup of these weights.

The direction is Gaussian, scaled in each tensor to the length of the soup's own displacement from sft0, so that no
layer moves more than it does there relative to the others. Its length is found by bisection on fixed samples of sft0.
"""

from salsa import anchors
from salsa.workflow import runs
from salsa.workflow.messages import UserError
from salsa.workflow.weights import soup_words, weight_of, weights_label

HALVINGS = 12  # of the interval that holds the displacement: 1 part in 4096 of its length


def build(settings, ingredients, earlier):
    """`earlier` gives the displacement without a search. Raises UserError when the soup is sft0 itself."""
    from salsa.rl.reference import Reference, check_alike, described, mix

    sft0 = ingredients.sft0
    target = mix(ingredients.folders, settings.reference.weights, ingredients.device, ingredients.dtype)
    check_alike(target, sft0, "noise")
    move = _mover(sft0, target, settings.seed)
    if earlier:
        move(earlier["displacement"])
        return Reference([target], earlier)
    samples = _samples(sft0, settings, ingredients)
    wanted = _mean_kl(sft0, target, samples, ingredients.micro_batch)
    if wanted <= 0:
        raise UserError("reference noise: the soup of its weights is sft0 itself; give other weights")

    def kl_at(length):
        move(length)
        return _mean_kl(sft0, target, samples, ingredients.micro_batch)

    displacement = _search(kl_at, wanted)
    summary = {
        **described(settings),
        "kl_sft0_soup": wanted,
        "kl_sft0_reference": kl_at(displacement),
        "displacement": displacement,  # in lengths of the soup's own displacement
    }
    return Reference([target], summary)


def _mover(sft0, target, seed):
    """A function that turns `target`, the soup, into sft0 + length * direction."""
    import torch

    start = {name: tensor.detach().clone() for name, tensor in sft0.named_parameters()}
    generator = torch.Generator().manual_seed(runs.derive_seed(seed, "noise", 0))
    direction = {}
    for name, tensor in target.named_parameters():
        random = torch.randn(tensor.shape, generator=generator).to(tensor.device, torch.float32)
        # float64: the same sum on any device and number of threads, and so the same reference whenever it is rebuilt.
        lengths = [x.double().norm().item() for x in (tensor - start[name], random)]
        direction[name] = random * (lengths[0] / max(lengths[1], 1e-12))

    @torch.no_grad()
    def move(length):
        for name, tensor in target.named_parameters():
            tensor.copy_(start[name] + length * direction[name])

    return move


def _search(kl_at, wanted):
    """The length at which an increasing `kl_at` is `wanted`."""
    low, high = 0.0, 1.0
    while kl_at(high) < wanted:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) < wanted else (low, middle)
    return (low + high) / 2


def _samples(model, settings, ingredients):
    from salsa.rl.rollout import sample_in_batches

    ids, encoded = ingredients.prompts
    seed, length = runs.derive_seed(settings.seed, "reference", 0), settings.lengths.response
    batches = sample_in_batches(model, ingredients.tokenizer, encoded, ids, seed, length, ingredients.micro_batch)
    return [sequences for _, sequences in batches]


def _mean_kl(model, reference, batches, micro_batch):
    import torch

    from salsa.rl.forward import exact_kl

    return torch.cat([exact_kl(model, reference, batch, micro_batch) for batch in batches]).mean().item()


def check(key, reference, training):
    """ValueError for a soup that is sft0 itself, at no distance from it."""
    if weight_of("sft0", reference.weights) == 1:
        raise ValueError(f"{key}: noise as far as sft0 from sft0 is none; give a soup's weights")


REFERENCE = anchors.Reference(
    kind="noise",
    build=build,
    words=lambda reference: f"sft0 moved at random, as far as {soup_words(reference.weights)}",
    label=lambda reference: weights_label(reference.weights, "noise"),
    check=check,
)
