"""/v1/chat/completions: a chat, and the assistant's next answer."""

import functools

from llm_jax.generate.events import TokenEvent
from llm_jax.serve.answer import Answer, Choice
from llm_jax.serve.errors import ApiError
from llm_jax.serve.insight import number
from llm_jax.serve.requests import ChatRequest
from llm_jax.serve.service import Service
from llm_jax.serve.vocabulary import Vocabulary
from llm_jax.serve.worker import Job

NO_CHATS = (
    "this model was not trained on chats, and its tokenizer brings no template for them: use "
    "/v1/completions, or start the server with --chat_template plain"
)


class ChatAnswer(Answer):
    """Raises ApiError for what the model, or this server, cannot do."""

    id_prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def __init__(self, service: Service, request: ChatRequest):
        super().__init__(service, request)
        if service.chats is None:
            raise ApiError(400, NO_CHATS, param="messages")
        if request.top_logprobs is not None and not request.logprobs:
            message = "top_logprobs goes with logprobs: true"
            raise ApiError(400, message, param="top_logprobs")
        size = service.vocabulary.size
        field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        tokens = service.new_tokens(getattr(request, field), None, field)
        chats, messages = service.chats, [message.plain() for message in request.messages]
        if text := "".join(message["content"] for message in messages):
            service.check_text(text, "messages")
        service.worker.check_count(request.choices)
        maker = functools.cache(lambda _: chats.prompt(messages))  # once for all choices
        config = request.config(tokens, size, (*request.stops, *chats.stops))
        self.choices = [
            ChatChoice(
                copy,
                service.vocabulary,
                Job(
                    maker,
                    config,
                    number=copy,
                    alternatives=min(request.top_logprobs or 0, size),
                    stop_tokens=chats.stop_tokens,
                ),
                with_logprobs=bool(request.logprobs),
            )
            for copy in range(request.choices)
        ]

    def _opening(self) -> list[str]:
        role = '{"role":"assistant","content":""}'
        return [
            f'{{"index":{index},"delta":{role},"logprobs":null,"finish_reason":null}}'
            for index in range(len(self.choices))
        ]

    def _counts(self) -> tuple[int, int]:
        return len(self.choices[0].job.prompt), sum(choice.job.count for choice in self.choices)


class ChatChoice(Choice):
    def __init__(self, index: int, vocabulary: Vocabulary, job: Job, *, with_logprobs: bool):
        super().__init__(index, vocabulary, job)
        self._with_logprobs = with_logprobs

    def take(self, event: TokenEvent) -> None:
        super().take(event)
        if self._with_logprobs:
            best = ",".join(
                self._entry(a.token, a.log_probability) + "}" for a in event.alternatives
            )
            entry = self._entry(event.token, event.log_probability)
            self._rows.append(f'{entry},"top_logprobs":[{best}]}}')

    def _entry(self, token: int, log_probability: float) -> str:
        """The beginning of an object."""
        return (
            f'{{"token":{self._vocabulary.text(token)},"logprob":{number(log_probability)},'
            f'"bytes":{self._vocabulary.byte_values(token)}'
        )

    def _content(self, text: str, streamed: bool) -> str:
        if not streamed:
            return f'"message":{{"role":"assistant","content":{text}}}'
        return f'"delta":{{"content":{text}}}' if text != '""' else '"delta":{}'

    def _logprobs(self) -> str:
        return f'{{"content":[{",".join(self._rows)}]}}' if self._with_logprobs else "null"
