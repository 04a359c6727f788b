"""How a step's batch is shared by the processes of a run, and what changes when their number does.

A configuration says what a run computes; the number of processes is only known when it starts. Under
`runtime.batch_rule = "keep"` it changes nothing but the number of parts in which a process goes through its share, and
with it how many images batch norm normalises together: another number of them is another run.
Under "linear" the batch follows the processes, and the learning rate and the number of steps follow the batch: that is
another run, too, so it is settled here before any identity is taken (docs/MACHINES.md).
"""

from __future__ import annotations

from semiseg.config import OptimConfig, RunConfig, RuntimeConfig, learns_masks
from semiseg.errors import UserError

# Images of one forward in evaluation: inference holds no activations for a backward, so eight fit where two train.
EVALUATION_IMAGES = 8


def fit_to_processes(config: RunConfig, processes: int) -> RunConfig:
    """The run that so many processes execute: the configuration itself under "keep", its scaled form under "linear".

    Linear rule: batch B' = images_per_process x processes, learning rate x B'/B, and steps (and warm-ups that are given
    in steps) x B/B', rounded up, so that at least as many images are seen. Epochs, milestones and default warm-ups
    already follow from the steps. Fitting twice to the same number of processes changes nothing more.

    Source: Goyal et al., Accurate, Large Minibatch SGD (2017), section 2.1.
    A UserError if a batch has no equal shares for so many processes, or under "linear" images_per_process does not
    divide by optim.accumulation.
    """
    if config.runtime.batch_rule == "keep":
        parts_per_step(config, processes)
        return config
    optim, images = config.optim, config.runtime.images_per_process
    if images % optim.accumulation:
        raise UserError(
            f"runtime.images_per_process = {images} must divide by optim.accumulation = {optim.accumulation} "
            "where runtime.batch_rule is 'linear'"
        )
    batch_size = images * processes
    if batch_size == optim.batch_size:
        return config

    def scaled(steps: int | None) -> int | None:
        return None if steps is None else (steps * optim.batch_size + batch_size - 1) // batch_size

    fitted = {
        "batch_size": batch_size,
        "learning_rate": optim.learning_rate * batch_size / optim.batch_size,
        "steps": scaled(optim.steps),
        "warmup_steps": scaled(optim.warmup_steps),
    }
    warmup = {"pairwise_warmup_steps": scaled(config.objective.pairwise_warmup_steps)}
    return config.model_copy(
        update={"optim": optim.model_copy(update=fitted), "objective": config.objective.model_copy(update=warmup)}
    )


def describe_change(config: RunConfig, fitted: RunConfig, processes: int) -> str | None:
    """A sentence with the old and new values of what `fit_to_processes` changed; None if it changed nothing."""
    changes = []
    for section in ("optim", "objective"):
        before, after = getattr(config, section), getattr(fitted, section)
        for name in type(before).model_fields:
            old, new = getattr(before, name), getattr(after, name)
            if old != new:
                # Rates to six digits, numbers of steps in full.
                shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in (old, new)]
                changes.append(f"{section}.{name} {' -> '.join(shown)}")
    if not changes:
        return None
    noun = "process" if processes == 1 else "processes"
    return (
        f"runtime.batch_rule = 'linear', {processes} {noun}, images_per_process = {config.runtime.images_per_process}: "
        f"{', '.join(changes)}; this is another run than on other numbers of processes, with results of its own"
    )


def parts_per_step(config: RunConfig, processes: int) -> int:
    """Accumulation parts in which each process goes through its share of a step.

    The smallest number from `optim.accumulation` on that cuts the batch into equal parts of at most
    `runtime.images_per_process` images (0 = no limit). A UserError if the batch has no equal shares for so many.
    """
    optim, limit = config.optim, config.runtime.images_per_process or config.optim.batch_size
    if _can_share(optim, processes):
        share = optim.batch_size // processes
        return next(n for n in range(optim.accumulation, share + 1) if share % n == 0 and share // n <= limit)
    allowed = [number for number in range(1, optim.batch_size + 1) if _can_share(optim, number)]
    near = [max(n for n in allowed if n < processes), *(n for n in allowed if n > processes)][:2]
    parts = f" in {optim.accumulation} parts each" if optim.accumulation > 1 else ""
    raise UserError(
        f"optim.batch_size = {optim.batch_size} has no equal shares for {processes} processes{parts}: take "
        f"{' or '.join(map(str, near))} of them, or set optim.batch_size to a multiple of "
        f"{processes * optim.accumulation}, or runtime.batch_rule = 'linear' with runtime.images_per_process"
    )


def normalised_together(config: RunConfig, processes: int) -> dict[str, dict[str, int]]:
    """What the cut of a step adds to a run's identity: over how many images its trained batch norms normalise.

    `bn` normalises the images of one process and part, `sync_bn` those of one part over all processes. Other norms look
    at one image at a time, and frozen ones at none. Kinds that see the whole batch in one forward are left out, and {}
    is that there is nothing to say.
    """
    cut = {norm: images for norm, images in batch_norms(config, processes).items() if images < config.optim.batch_size}
    return {"normalised_together": cut} if cut else {}


def batch_norms(config: RunConfig, processes: int) -> dict[str, int]:
    """The kinds of trained batch norm -> how many images each normalises together."""
    batch, parts = config.optim.batch_size, parts_per_step(config, processes)
    images = {"bn": batch // parts // processes, "sync_bn": batch // parts}
    return {norm: images[norm] for norm in sorted(_trained_norms(config) & images.keys())}


def _trained_norms(config: RunConfig) -> set[str]:
    """The kinds of norm in what a training computes and does not freeze; the head's are group norm."""
    model = config.model
    norms: set[str] = set()
    if model.backbone.frozen_stages < 4:
        norms.add(model.backbone.norm)
    if model.neck.kind == "bifpn":
        norms.add(model.neck.norm)
    if learns_masks(config):  # else the mask head is neither trained nor computed
        norms.add(model.mask_norm)
    return norms


def _can_share(optim: OptimConfig, processes: int) -> bool:
    return optim.batch_size % processes == 0 and optim.batch_size // processes >= optim.accumulation


def images_in_evaluation(runtime: RuntimeConfig) -> int:
    """Images of one forward in evaluation: eight, or fewer where `images_per_process` allows fewer."""
    return min(runtime.images_per_process or EVALUATION_IMAGES, EVALUATION_IMAGES)
