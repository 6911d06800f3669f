"""Opens what `edge-vlm eval` measures here: entry points of `edge_vlm.evaluators`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from edge_vlm.errors import ConfigError
from edge_vlm.evaluation.plan import is_server
from edge_vlm.evaluation.runs import EvaluatorOptions
from edge_vlm_runtime.client.connection import Access
from edge_vlm_runtime.demo.paths import DEMO_BUNDLE
from edge_vlm_runtime.engines.names import Backend
from edge_vlm_runtime.evaluation.bundle import BundleEvaluator, identity_of
from edge_vlm_runtime.evaluation.served import ServedEvaluator
from edge_vlm_runtime.server.access.auth import read_api_key
from edge_vlm_runtime.server.app import Server


@contextmanager
def open_bundle(target: str | None, options: EvaluatorOptions) -> Iterator[BundleEvaluator]:
    """The path `bundle`, by default of the demo model.

    Raises BundleError and its leaves, MissingExtraError, EngineError, ConfigError.
    """
    backend = host_backend(options.backend)
    bundle = Path(target or DEMO_BUNDLE)
    evaluator = BundleEvaluator(bundle, options.threads, backend, options.reuse)
    try:
        yield evaluator
    finally:
        evaluator.close()


@contextmanager
def open_served(target: str | None, options: EvaluatorOptions) -> Iterator[ServedEvaluator]:
    """The path `served`: a URL, or a server of its own for a bundle, by default the demo model's.

    Raises ServerUnreachable and its leaves, ProtocolError, ConfigError, and for a bundle
    BundleError, EngineError and their leaves, MissingExtraError.
    """
    with ExitStack() as stack:
        if target is not None and is_server(target):
            if options.backend != EvaluatorOptions.backend:
                raise ConfigError(
                    f"a server that runs has chosen its backend; --backend {options.backend} is "
                    "for bundles",
                    remedy="name a bundle, or leave it out",
                )
            key = read_api_key(options.api_key_file)
            access = Access(api_key=key, ca_file=options.tls_ca)
            evaluator = ServedEvaluator(target, access, reuse=options.reuse)
        else:
            bundle = Path(target or DEMO_BUNDLE)
            backend = host_backend(options.backend)
            server = stack.enter_context(
                Server.open(bundle, threads=options.threads, backend=backend)
            )
            server.start()
            identity = identity_of(bundle, backend)
            evaluator = ServedEvaluator(server.url, Access(), identity, options.reuse)
        stack.callback(evaluator.close)
        yield evaluator


def host_backend(name: str) -> Backend:
    """Raises ConfigError: caches are read on the host here."""
    offered = [backend.value for backend in Backend if not backend.is_on_gpu]
    if name not in offered:
        raise ConfigError(
            f"--backend cannot be {name!r} here", remedy=f"one of {', '.join(offered)}"
        )
    return Backend(name)
