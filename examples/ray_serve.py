"""`glm serve` on many machines: Ray Serve starts copies of it, spreads requests over them and replaces what fails.

    pip install "ray[serve]" "glmkit[serve]"
    GLM_MODEL=models/chatglm3-6b serve run examples.ray_serve:app

Every copy is a process with a model, a batch engine and the whole API of its own; what it has read of a conversation
stays with it. Keys, limits on addresses and TLS belong in front of Ray's proxy.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve


def build_app() -> Any:
    """Makes the API with its model; runs once in each copy.

    Returns:
        The FastAPI application of `glm serve`.
    """
    import glmkit
    from glmkit.chat.following import serve as serve_model
    from glmkit.serve.app import create_app

    path = os.environ.get("GLM_MODEL", "glm-nano")
    served = serve_model(glmkit.load(path), os.path.basename(path.rstrip("/")))
    return create_app(served)


@serve.deployment(
    num_replicas=int(os.environ.get("GLM_COPIES", "2")),
    max_ongoing_requests=80,  # 16 that run and 64 that wait; more are refused by the engine itself
    ray_actor_options={"num_cpus": 2},  # {"num_gpus": 1} on a machine with GPUs
    health_check_period_s=10,
)
@serve.ingress(build_app)
class Model:
    """One copy."""


app = Model.bind()
