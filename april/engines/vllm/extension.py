"""What a vLLM server loads of April: vLLM imports this in each worker, before the model, when it is started with

--weight-transfer-config '{"backend": "april"}' --worker-extension-cls april.engines.vllm.extension.AprilWorker
"""

from __future__ import annotations

from april.engines.vllm.transfer import register


class AprilWorker:
    """Adds nothing to a worker; that this module is imported makes the weight-transfer backend known."""


register()
