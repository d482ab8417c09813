"""The verb `serve`: an OpenAI-compatible server for a datastore's kNN-LM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli import options
from knnlm.cli.shared import load_own

if TYPE_CHECKING:
    from knnlm.server.limits import Limits

Host = Annotated[
    str, typer.Option("--host", help="Address to listen on; other than a loopback address, it needs a key.")
]
Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0 picks a free one.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="KNNLM_API_KEY", help="Key that clients must send; safer as KNNLM_API_KEY."),
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen on any address without a key.")]
PromptTokens = Annotated[int, typer.Option("--max-prompt-tokens", help="Maximum number of tokens in a prompt.")]
CompletionTokens = Annotated[int, typer.Option("--max-completion-tokens", help="Maximum number of tokens in a choice.")]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="Maximum number of choices that are generated together.")]
MaxQueue = Annotated[
    int, typer.Option("--max-queue", help="Maximum number of waiting choices; more are refused with status 429.")
]
MaxSeconds = Annotated[float, typer.Option("--max-seconds", help="Maximum duration of a request.")]


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of a request and of the queue."""

    max_prompt_tokens: PromptTokens = 8192
    max_completion_tokens: CompletionTokens = 2048
    max_batch: MaxBatch = 16
    max_queue: MaxQueue = 128
    max_seconds: MaxSeconds = 120.0

    def limits(self) -> Limits:
        """Raises as `Limits`."""
        from knnlm.server.limits import Limits

        return Limits(
            prompt_tokens=self.max_prompt_tokens,
            completion_tokens=self.max_completion_tokens,
            batch=self.max_batch,
            queue=self.max_queue,
            seconds=self.max_seconds,
        )


def _check_access(host: str, api_key: str | None, *, insecure: bool) -> None:
    """Refuse a key that no client can send, and an address at which anybody could read without one."""
    from knnlm.server.gate import is_loopback

    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise typer.BadParameter("the key is empty or has more than visible ASCII", param_hint="--api-key")
    if not (is_loopback(host) or api_key or insecure):
        message = f"anybody could use the model and read from its text at {host}; give --api-key, or --insecure"
        raise typer.BadParameter(message, param_hint="--host")


def _ready(name: str, host: str, listener: socket) -> str:
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    return f"Serving {name} at {address} (Ctrl-C ends it)"


def serve(
    *,
    call: typer.Context,
    stores: options.StoreOptions,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    insecure: Insecure = False,
    retrieving: options.RetrievalOptions,
    limiting: LimitOptions,
    max_copy: options.MaxCopy = None,
    memory: options.Memory = None,
    model: options.OtherModel = None,
    compute: options.ComputeOptions,
    address: options.Ray = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Serve the kNN-LM over OpenAI's completions API, with a web page that explains its predictions.

    Example: knnlm serve nursing.knn --port 8000
    """
    from knnlm.server.hang_ups import hang_ups_wait

    with hang_ups_wait():
        _check_access(host, api_key, insecure=insecure)
        from knnlm.documents import whole_text
        from knnlm.inference.model import KNNLM
        from knnlm.server.app import create_app
        from knnlm.server.explorer.routes import explorer_router
        from knnlm.server.run import listen, serve
        from knnlm.server.service import Service

        limits, screen, bound = limiting.limits(), options.open_screen(call), options.memory_bytes(memory)
        with listen(host, port) as listener, options.actors(address, trust=trust_remote_code) as opening:
            opened = stores.open()
            retrieval = retrieving.open(opened, bound, opening)
            lm = load_own(opened, model, compute, trust_remote_code, screen)
            service = Service(
                whole_text(opened.name if len(stores.store) > 1 else Path(stores.store[0]).resolve().name),
                lm,
                KNNLM.from_retrieval(lm, retrieval),
                limits,
                max_copy=max_copy,
                newest=lambda: retrieving.open(stores.open(), bound, opening),
                memory=bound,
            )
            page = explorer_router(service.explainer, service.thread.run, limits.seconds)
            del opened, retrieval  # of the first generation, which must not outlive its use
            app = create_app(service, api_key=api_key, only_local=not (api_key or insecure), routers=[page])
            serve(app, service, listener, lambda: screen.say(_ready(service.name, host, listener)), screen.say)
