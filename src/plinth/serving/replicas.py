"""Several servers of one model behind one address, by Ray Serve (the extra `cluster`)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from plinth.config import UserError
from plinth.run import usable_cores


def serve_replicas(build_app: Callable[[], Any], replicas: int, *, host: str, port: int, requests_each: int) -> Callable[[], None]:
    """Start `replicas` processes that each serve `build_app()`, an ASGI application, and one proxy that shares requests among them.

    Returns what stops them. `requests_each`: requests that one replica may hold; the proxy keeps further ones. Joins the cluster that the
    environment names (RAY_ADDRESS), or starts one on this machine, whose cores the replicas share; a GPU each where there is one.
    Raises UserError when Ray is not installed or a replica does not come up.
    """
    if replicas < 1:
        raise UserError(f"ray_replicas={replicas} must be at least 1.")
    try:
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException
    except ImportError as error:
        raise UserError(f"ray_replicas={replicas} needs Ray Serve ({error}). Install it: pip install 'plinth-fm[cluster]'.") from None
    ray.init(include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    serve.start(http_options={"host": host, "port": port})

    class Replica:
        """Ray makes one in each process."""

    def build() -> Any:  # a plain function: Ray takes any other callable for the application itself
        return build_app()

    actor = {"num_gpus": 1} if torch.cuda.is_available() else {"num_cpus": max(1, usable_cores() // replicas)}
    deployment = serve.deployment(
        serve.ingress(build)(Replica),
        name="plinth",
        num_replicas=replicas,
        max_ongoing_requests=requests_each,
        ray_actor_options=actor,
        graceful_shutdown_timeout_s=30,
    )
    try:
        serve.run(deployment.bind(), name="plinth", route_prefix="/")
    except (RayServeException, RuntimeError) as error:
        serve.shutdown()
        raise UserError(f"a replica did not come up: {str(error).strip().splitlines()[-1]}") from None
    return serve.shutdown


def wait_for_interrupt() -> None:
    """Return at Ctrl-C."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
