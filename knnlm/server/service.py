"""The served kNN-LM with its thread; turns requests into prompts for that thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from knnlm.errors import InputError, first_line
from knnlm.inference.batch import RowModel
from knnlm.inference.copying import CopyGuard
from knnlm.inference.detokenizer import encode_prompt, end_tokens
from knnlm.inference.explain import Explainer
from knnlm.inference.model import KNNLM
from knnlm.knn.mixing import Mix
from knnlm.knn.retrieval import Retrieval
from knnlm.model.lm import LanguageModel
from knnlm.server.chat_wire import ChatRequest, Message
from knnlm.server.choices import Cite, Prompt, Wish, Words
from knnlm.server.forms import ChatForm, CompletionForm
from knnlm.server.limits import Limits
from knnlm.server.metrics import Metrics
from knnlm.server.model_thread import ModelThread
from knnlm.server.refusals import Refusal
from knnlm.server.served import Generations, Served
from knnlm.server.wire import CompletionRequest, Sampling


class Service:
    """One kNN-LM under one name. The model may be used only through `thread.run`."""

    closing = False
    """Whether the server is shutting down and refuses new requests."""
    forced = False
    """Whether it ends without finishing what runs."""
    active = 0
    """Number of requests being answered."""

    def __init__(
        self,
        name: str,
        lm: LanguageModel,
        model: KNNLM,
        limits: Limits | None = None,
        *,
        max_copy: int | None = None,
        newest: Callable[[], Retrieval] | None = None,
        memory: float | None = None,
    ) -> None:
        """Serve a model; its thread is not yet started.

        :param max_copy: the longest run of generated tokens that may stand verbatim in one document. A request may set
            a smaller one.
        :param newest: opens the newest generation of the datastore, for `reload`; None: there is none.
        :param memory: bytes that the process may take; a reload that needs more is refused.
        :raises InputError: `max_copy` is below 1, or `memory` cannot be kept.
        """
        self.name, self.lm, self.limits = name, lm, limits or Limits()
        self.created = int(time.time())
        self.metrics = Metrics()
        self.thread = ModelThread(RowModel(model, lm.vocabulary), self.limits, self.metrics)
        self._words = Words(lm, end_tokens(model, lm))
        self._citer, self._max_copy = model.citer, max_copy
        self._generations = Generations(lm, model, newest, max_copy, memory)

    @property
    def retrieval(self) -> Retrieval:
        """What requests that begin now are answered from."""
        return self._generations.now.retrieval

    def explainer(self) -> Explainer:
        """Return an explainer of what is served now; for the model's thread, as what `explorer_router` is given."""
        return self._generations.explainer()

    def reload(self) -> Served:
        """Answer from the datastore's newest generation, as `Generations.reload`; requests that run keep theirs."""
        return self._generations.reload()

    def check_model(self, name: str) -> None:
        """:raises Refusal: another model is requested."""
        if name != self.name:
            message = f"there is no model {name!r} here; the one that is served is {self.name!r}"
            raise Refusal(404, message, param="model", code="model_not_found")

    def completion_form(self, request: CompletionRequest) -> CompletionForm:
        """The form of the answer to a request."""
        return CompletionForm(self._words, scored=request.logprobs is not None)

    def chat_form(self, request: ChatRequest) -> ChatForm:
        """The form of the answer to a request."""
        return ChatForm(self._words, scored=bool(request.logprobs))

    def check(self, request: Sampling) -> None:
        """Check a request before any work on it.

        :raises Refusal: a field is not supported or beyond a limit, or the queue is full.
        """
        self.check_model(request.model)
        if request.stream_options is not None and not request.stream:
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."  # as OpenAI has it
            raise Refusal(400, message, param="stream_options")
        prompts = len(_one_by_one(request)) if isinstance(request, CompletionRequest) else 1
        self._check_choices(request, prompts * (request.n or 1))
        self.thread.check_room(prompts * (request.n or 1))

    def check_chat(self, request: ChatRequest) -> None:
        """Check a chat request before any work on it.

        :raises Refusal: as `check`; or the model's tokenizer has no chat template.
        """
        self.check_model(request.model)
        if self.lm.tokenizer.chat_template is None:
            message = f"{self.name!r} has no chat template: its tokenizer says nothing of messages; use /v1/completions"
            raise Refusal(404, message, code="no_chat_template")
        if request.top_logprobs is not None and not request.logprobs:
            raise Refusal(400, "top_logprobs is only allowed when logprobs is true", param="top_logprobs")
        self.check(request)

    def chat_prompts(self, request: ChatRequest) -> list[Prompt]:
        """The prompt made from the messages by the chat template. Raises as `prompts`."""
        if request.max_completion_tokens is not None:
            self._check_new(request.max_completion_tokens, "max_completion_tokens")
        tokens = self._templated(request.messages)
        room = self.limits.completion_tokens
        if self.lm.context_limit is not None:
            room = max(1, min(room, self.lm.context_limit - len(tokens)))  # without room `prompts` refuses it
        shared = {name: getattr(request, name) for name in Sampling.model_fields}
        wanted, told = request.wanted_tokens, (request.top_logprobs or 0) if request.logprobs else None
        return self.prompts(
            CompletionRequest.model_construct(
                **shared, prompt=tokens, max_tokens=room if wanted is None else wanted, logprobs=told
            ),
            field="messages",
        )

    def _templated(self, messages: Sequence[Message]) -> list[int]:
        roles = {"developer": "system"}  # OpenAI's newer name, which templates do not know
        said = [{"role": roles.get(one.role, one.role), "content": one.text} for one in messages]
        try:
            text = self.lm.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise errors of their own, such as for roles that do not alternate
            message = f"the chat template refuses the messages: {first_line(error)}"
            raise Refusal(400, message, param="messages") from error
        # Not `lm.encode`: the template already has the BOS token.
        tokens = list(self.lm.tokenizer(text, add_special_tokens=False)["input_ids"])
        return tokens or self._encode("", 0, "messages")

    def prompts(self, request: CompletionRequest, field: str = "prompt") -> list[Prompt]:
        """The prompts of a request, with all their choices. Tokenizing long texts takes a moment.

        :param field: the request's field that they come from, for errors.
        :raises Refusal: a field is beyond a limit or not supported.
        """
        given, n, served = _one_by_one(request), request.n or 1, self._generations.now
        retrieval, wish = self._retrieval_of(request, served), self._wish(request)
        guard, cite = self._guard_of(request, served), self._cite_of(request, retrieval)
        tokens = [self._encode(one, wish.max_tokens, field) for one in given]
        if wish.scores_prompt:
            self._check_scored(n * sum(map(len, tokens)))
        found = []
        for number, one in enumerate(given):
            text = one if isinstance(one, str) else self._words.text(one)
            prompt = Prompt(
                self._words,
                tokens[number],
                text,
                retrieval,
                wish,
                first=number * n,
                n=n,
                seed=request.seed,
                guard=guard,
                cite=cite,
            )
            found.append(prompt)
        return found

    def _check_scored(self, tokens: int) -> None:
        most = self.limits.scored_tokens
        if tokens > most:
            message = f"the prompts with n ask for log-probabilities of {tokens} of their tokens, but at most {most}"
            raise Refusal(400, f"{message} are told; send fewer", param="prompt")

    def _check_choices(self, request: Sampling, choices: int) -> None:
        n, limits = request.n or 1, self.limits
        if n > limits.batch:
            raise Refusal(400, f"n is {n}, but at most {limits.batch} choices are made of a prompt", param="n")
        if isinstance(request, CompletionRequest) and request.best_of not in (None, n):
            message = f"best_of is {request.best_of}, but must be n, which is {n}: the best of more is not looked for"
            raise Refusal(400, message, param="best_of")
        if choices > limits.queue:
            message = f"the prompts with n ask for {choices} choices, but at most {limits.queue} can wait; send fewer"
            raise Refusal(400, message, param="prompt")

    def _retrieval_of(self, request: CompletionRequest, served: Served) -> Retrieval:
        asked, own = request.knn, served.retrieval.setting
        if asked is None:
            return served.retrieval
        most = min(served.count, max(self.limits.neighbors, own.k))
        if asked.k is not None and asked.k > most:
            raise Refusal(400, f"knn.k is {asked.k}, but can be at most {most}", param="knn.k")
        setting = Mix(
            own.k if asked.k is None else asked.k,
            own.temperature if asked.temperature is None else asked.temperature,
            own.lam if asked.lam is None else asked.lam,
            # A given lambda is the same for all tokens.
            own.gate if asked.lam is None else None,
            own.by_text and asked.lam is None,
        )
        return Retrieval(served.retrieval.searcher.at(setting.temperature), setting)

    def _guard_of(self, request: CompletionRequest, served: Served) -> CopyGuard | None:
        asked = None if request.knn is None else request.knn.max_copy
        if asked is None or (self._max_copy is not None and self._max_copy <= asked):
            return served.guard
        return self._generations.guard(served.retrieval, asked)

    def _cite_of(self, request: CompletionRequest, retrieval: Retrieval) -> Cite | None:
        if not (request.knn and request.knn.citations):
            return None
        return lambda tokens, first: self._citer.tokens(tokens, first, retrieval).whole

    def _wish(self, request: CompletionRequest) -> Wish:
        tokens = 16 if request.max_tokens is None else request.max_tokens  # the defaults are those of OpenAI's API
        self._check_new(tokens, "max_tokens")
        return Wish(
            max_tokens=tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            stop=(request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            logprobs=request.logprobs,
            echo=bool(request.echo),
        )

    def _check_new(self, tokens: int, field: str) -> None:
        most = self.limits.completion_tokens
        if tokens > most:
            raise Refusal(400, f"{field} is {tokens}, but can be at most {most}", param=field)

    def _encode(self, prompt: str | Sequence[int], new: int, field: str) -> list[int]:
        """Tokens of one prompt; with `new` more they must fit into the model's context."""
        try:
            tokens = encode_prompt(self.lm, prompt) if isinstance(prompt, str) else list(prompt)
        except InputError as error:
            raise Refusal(400, str(error), param=field) from error
        if wrong := next((token for token in tokens if token >= self.lm.vocabulary), None):
            message = f"token {wrong} of the prompt is none of the model's {self.lm.vocabulary}; use its own tokenizer"
            raise Refusal(400, message, param=field)
        context, most = self.lm.context_limit, self.limits.prompt_tokens
        if len(tokens) > most or (context is not None and len(tokens) + new > context):
            limit = f"{most} of a prompt here" if len(tokens) > most else f"{context} of the model's context"
            message = f"a prompt of {len(tokens)} tokens and {new} new ones are beyond the {limit}; shorten it"
            raise Refusal(400, message, param=field, code="context_length_exceeded")
        return tokens


def _one_by_one(request: CompletionRequest) -> list[str | list[int]]:
    """The field `prompt`, in any of its forms, as a list of texts or of lists of tokens."""
    prompt = request.prompt
    if prompt is None or isinstance(prompt, str):
        return [prompt or ""]
    return [prompt] if isinstance(prompt[0], int) else list(prompt)
