"""Why a layout was chosen for a cluster, what else there was, and what to doubt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from plinth.scaling.cluster_memory import GpuMemory
from plinth.scaling.cluster_plan import EQUAL, Option, Workload, tensor_degrees
from plinth.scaling.laws import BESIROGLU, STEP_LAW

ITEMS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
LONG_CONTEXT = 32_768
MANY_GPUS = 16_384


def explain(work: Workload, options: Sequence[Option], chosen: Option) -> Iterator[str]:
    """Yield a sentence on each simpler choice that was passed over, and on what is faster but beyond Plinth."""
    mine = [option for option in options if option.runs_in_plinth == chosen.runs_in_plinth or not chosen.runs_in_plinth]
    layout = chosen.layout
    for degree in tensor_degrees(work):
        if degree != layout.tensor:
            yield _why_not(f"TP {degree}", mine, chosen, lambda option, degree=degree: option.layout.tensor == degree, work)
    if layout.checkpointing != "none":
        yield _why_not("nothing recomputed", mine, chosen, lambda option: option.layout.checkpointing == "none", work)
    if layout.replicate > 1:
        yield _why_not("one shard group over all", mine, chosen, lambda option: option.layout.replicate == 1, work)
    elif layout.shard > work.config.gpus_per_node:
        yield _why_not("copies of the state (HSDP)", mine, chosen, lambda option: option.layout.replicate > 1, work)
    if layout.pipeline > 1:
        yield _why_not("no pipeline", mine, chosen, lambda option: option.layout.pipeline == 1, work)
    yield from _beyond(work, options, chosen)


def _why_not(label: str, options: Sequence[Option], chosen: Option, belongs: Callable[[Option], bool], work: Workload) -> str:
    """Return why the best option of a kind was not taken: it does not fit, or how much slower it is and by what."""
    those = [option for option in options if belongs(option)]
    if not those:
        return f"{label}: the {work.sequences:,} sequences of a step cannot be dealt to that many data-parallel ranks (tokens_per_step)."
    fitting = [option for option in those if option.step is not None]
    if not fitting:
        least = min(those, key=lambda option: option.memory.used)
        return f"{label} does not fit: at least {least.memory.used / 1e9:.1f} GB ({largest_items(least.memory)}; {least.layout})."
    best = min(fitting, key=lambda option: option.step_s)
    slower = best.step_s / chosen.step_s - 1
    if slower < 0.001:
        return f"{label} is no slower, but less simple ({best.layout})."
    return f"{label} is {slower:.1%} slower{_main_cost(best, chosen)} ({best.layout})."


def largest_items(memory: GpuMemory, count: int = 3) -> str:
    """Return the largest items of a memory budget in words."""
    items = sorted(ITEMS, key=lambda name: -getattr(memory, name))[:count]
    return ", ".join(f"{name} {getattr(memory, name) / 1e9:.1f}" for name in items)


def _main_cost(option: Option, chosen: Option) -> str:
    """Return what an option spends most on beyond what the chosen one does."""
    spent, before = _parts(option), _parts(chosen)
    more = {name: seconds - before.get(name, 0.0) for name, seconds in spent.items()}
    name = max(more, key=lambda key: more[key])
    return f", most of it {name} (+{more[name]:.2g} s a step)" if more[name] > 0 else ""


def _parts(option: Option) -> dict[str, float]:
    """Return what of a step is not the model's own products, seconds."""
    step = option.step
    assert step is not None
    parts = {"recomputation": step.recomputed_s, "the pipeline's bubble": step.bubble_s, "memory passes": step.passes_s}
    parts["the optimizer"] = step.optimizer_s
    return parts | {f"transfers of {each.name}": each.exposed_s for each in step.transfers}


def _beyond(work: Workload, options: Sequence[Option], chosen: Option) -> Iterator[str]:
    """Say what a wider choice than Plinth's would bring, or what Plinth's own best would cost."""
    fitting = [option for option in options if option.step is not None]
    own = [option for option in fitting if option.runs_in_plinth]
    best = min(fitting, key=lambda option: option.step_s)
    if chosen.runs_in_plinth:
        alike = min((o for o in fitting if o.layout.pipeline == o.layout.context == 1), key=lambda option: option.step_s)
        for option in dict.fromkeys((alike, best)):
            if option.step_s < chosen.step_s * (1 - EQUAL):
                faster = f"{option.layout} would take {1 - option.step_s / chosen.step_s:.1%} less time a step"
                yield f"Beyond what Plinth runs: {faster} (--parallelism any)."
    elif own:
        mine = min(own, key=lambda option: option.step_s)
        yield f"Plinth itself runs {mine.layout}: {mine.step_s / chosen.step_s - 1:.1%} slower a step (--parallelism plinth)."
    else:
        least = min((option for option in options if option.runs_in_plinth), key=lambda option: option.memory.used, default=None)
        if least is not None:
            need = f"{least.memory.used / 1e9:.1f} GB ({largest_items(least.memory)})"
            yield f"Of what Plinth runs, the leanest needs {need} of {work.usable_bytes / 1e9:.1f} GB: {least.layout}."


def doubts(work: Workload, chosen: Option) -> Iterator[str]:
    """Yield what a reader should not take at face value."""
    if not chosen.runs_in_plinth:
        yield "this layout is beyond what Plinth runs (FSDP, HSDP, tensor parallelism, checkpointing): use an engine that has the rest."
    if not work.gpu.calibrated:
        yield f"no published run on {work.gpu.label} set its sustained rate: the H100's share of the measured maximum is assumed."
    if work.seq_len >= LONG_CONTEXT:
        yield "at long context the time rests on attention's kernel: published runs differ from the prediction by up to a half."
    if work.config.gpus >= MANY_GPUS:
        yield "failures, stragglers and checkpoints are not counted; at this size they take a tenth of the time and more."
    if BESIROGLU.is_outside(work.shape.num_params, work.tokens * BESIROGLU.bytes_per_token):
        yield "the loss is extrapolated beyond the sizes and lengths of the law's runs."


def plan_sources(work: Workload) -> dict[str, str]:
    """Return where each number of a plan comes from."""
    config = work.config
    given_tokens = "given" if config.tokens else f"compute-optimal for these parameters by {BESIROGLU.name} ({BESIROGLU.source})"
    given_batch = "given" if config.tokens_per_step else f"{STEP_LAW.name} ({STEP_LAW.source}), in multiples of the accelerators"
    return {
        "accelerator": work.gpu.source,
        "tokens": given_tokens,
        "tokens_per_step": given_batch,
        "memory": "counted from the shape (cluster_memory.py); activations after Korthikanti et al. 2022, arXiv:2205.05198",
        "time": "rates and constants of accelerators.py and cluster_time.py, checked against the runs of published.py",
        "energy": f"estimate: {work.gpu.watts:g} W an accelerator, +{config.host_share:.0%} for hosts, x {config.pue:g} (data centre)",
        "loss": f"{BESIROGLU.name} ({BESIROGLU.source})",
    }
