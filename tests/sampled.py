"""Roll-outs of a model as it is, for tests that want one alone."""

from plinth.posttraining.rollouts import Rollouts, SampleConfig, Sampler


def roll_out(model, prompts, end_ids, config=None, *, seed=0, num_threads=1) -> Rollouts:
    """Sample config.group_size completions of each prompt with a sampler of its own."""
    sampler = Sampler(model, tuple(end_ids), config or SampleConfig(), num_threads)
    try:
        return sampler.sample(prompts, [seed] if isinstance(seed, int) else seed)
    finally:
        sampler.close()
