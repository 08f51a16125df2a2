"""Rotary positions in config.json: rope_parameters as they are written now, rope_theta and rope_scaling as they were before."""

from __future__ import annotations

import math
from typing import Any

from plinth.config import UserError
from plinth.models.config import DecoderConfig, RopeScaling

LOCAL_THETA = 10_000.0  # of blocks with a window in Gemma 3
NAMES = {  # our field → theirs
    "original_max_seq_len": "original_max_position_embeddings",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "truncate": "truncate",
}
OF_KIND = {
    "linear": (),
    "llama3": ("original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_seq_len", "beta_fast", "beta_slow", "attention_factor", "truncate"),
}
REASONS = {"dynamic": " (its frequencies change as a text grows, so that keys computed before no longer fit)"}


def read_rope(values: dict[str, Any], theta: float, *, has_local: bool = False) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and local_rope_theta as plain values; `theta` is the base where config.json names none.

    Raises UserError for a scaling that the decoder does not have.
    """
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    nested = values.get("rope_parameters") or {}
    if "full_attention" in nested:
        scaled = values.get("rope_scaling") or {}
        fields = _read({**(nested["full_attention"] or {}), **scaled}, values, theta)
        local = nested.get("sliding_attention") or {}
        if _kind(local) != "default":
            raise UserError(f"rope_parameters.sliding_attention has rope_type={_kind(local)!r}. Supported there: default.")
        local_theta = local.get("rope_theta")
    else:
        if "rope_theta" in nested and "rope_theta" not in parameters:
            parameters = {**parameters, "rope_theta": nested["rope_theta"]}
        fields, local_theta = _read(parameters, values, theta), None
    if has_local:
        fields["local_rope_theta"] = float(local_theta or values.get("rope_local_base_freq") or LOCAL_THETA)
    return fields


def _kind(parameters: dict[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _read(parameters: dict[str, Any], values: dict[str, Any], theta: float) -> dict[str, Any]:
    kind = _kind(parameters)
    fields: dict[str, Any] = {"rope_theta": float(parameters.get("rope_theta") or values.get("rope_theta") or theta)}
    if parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise UserError(f"partial_rotary_factor={parameters['partial_rotary_factor']} is not supported. Supported: 1.0.")
    if kind == "default":
        return fields
    if kind not in OF_KIND:
        raise UserError(f"rope_type={kind!r} is not supported{REASONS.get(kind, '')}. Supported: default, {', '.join(OF_KIND)}.")
    given = {ours: parameters[NAMES[ours]] for ours in OF_KIND[kind] if parameters.get(NAMES[ours]) is not None}
    if kind != "linear":
        outer = values.get("original_max_position_embeddings") or given.get("original_max_seq_len")
        given["original_max_seq_len"] = int(outer or values["max_position_embeddings"])
    factor = parameters.get("factor") or values["max_position_embeddings"] / given["original_max_seq_len"]
    if kind == "yarn" and "attention_factor" not in given and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        given["attention_factor"] = _mscale(factor, parameters["mscale"]) / _mscale(factor, parameters["mscale_all_dim"])
    numbers = {name: value if name in ("truncate", "original_max_seq_len") else float(value) for name, value in given.items()}
    return fields | {"rope_scaling": {"kind": kind, "factor": float(factor), **numbers}}


def _mscale(factor: float, weight: float) -> float:
    """Return DeepSeek's factor on queries and keys, of which YaRN's is the one of weight 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """Return what the config.json of a model_type says of the rotation, for readers of today and of before."""
    if config.position != "rope":
        return {}
    scaling = write_scaling(config.rope_scaling)
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_theta}
    values: dict[str, Any] = {"rope_theta": config.rope_theta}
    if scaling:
        values["rope_scaling"] = scaling
    if kind != "gemma3_text":
        return values | {"rope_parameters": parameters}
    theta = config.local_rope_theta or LOCAL_THETA  # without a window nothing is rotated by it
    local = {"rope_type": "default", "rope_theta": theta}
    return values | {
        "rope_local_base_freq": theta,
        "rope_parameters": {"full_attention": parameters, "sliding_attention": local},
    }


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """Return a scaling in config.json's words."""
    if scaling is None:
        return None
    own = {NAMES[name]: getattr(scaling, name) for name in OF_KIND[scaling.kind] if getattr(scaling, name) is not None}
    return {"rope_type": scaling.kind, "factor": scaling.factor, **own}
