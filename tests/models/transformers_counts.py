"""What transformers counts for the values of a config.json: the model is built on the meta device, where weights take no memory.

`python tests/models/transformers_counts.py` writes golden_counts.json, the counts of all presets.
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).with_name("golden_counts.json")
CAUSAL_DEFAULT = "AutoModelForCausalLM"


def transformers_count(values: dict) -> int:
    """Return the parameters of the model, tied ones once."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**values)
    with torch.device("meta"):
        if values.get("architectures"):
            model = getattr(transformers, values["architectures"][0])(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    fixed = "embed_positions" if config.model_type == "marian" else None  # sinusoids that are stored as a parameter that is not trained
    return sum(parameter.numel() for name, parameter in model.named_parameters() if fixed is None or fixed not in name)


def main() -> None:
    from plinth.models.presets import PRESETS

    counts = {}
    for name, values in PRESETS.items():
        counts[name] = transformers_count(values)
        print(f"{name}: {counts[name]:,}")
    GOLDEN.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
