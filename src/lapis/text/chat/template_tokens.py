"""Which tokens a chat template writes: two vocabularies in, the tokens that only chatting gave a meaning out.

A template may spell a token, or put it together ('<|' + message.role + '|>'), so it is also rendered, on short chats,
where everything else that a template does runs: in a process with limits (template.py).
"""

from functools import lru_cache

from lapis.errors import TemplateError
from lapis.text.chat.template import render_jobs
from lapis.text.tokenizer.vocabulary import Vocabulary

_TURNS = (("system", "Be kind."), ("user", "Why?"), ("assistant", "Since."), ("user", "Oh."))


def template_tokens(chat: Vocabulary, base: Vocabulary | None) -> list[str]:
    """The tokens that only chatting gave a meaning: whose rows a base model, and its continuation, never trained.

    These are the added tokens that the chat template writes, in its source or where it is rendered, and the chat
    model's end tokens. Those that the base itself names as begin, end or padding it has trained; of them only such
    count as stand in the template's source.

    Args:
        chat: Of the chat model.
        base: Of the base; None where it has none that is text.
    """
    tags = {token for token in chat.added if token in chat.special or _is_tag(token)}
    spelled = {token for token in tags if chat.template and token in chat.template}
    known = set(base.named.values()) | {t for t, i in base.ids.items() if i in base.ends} if base else set()
    written = {token for token in tags if token in rendered(chat.template, tuple(sorted(chat.named.items())))}
    ends = {token for token, i in chat.ids.items() if i in chat.ends}
    return sorted(spelled | ((written | ends) - known), key=lambda token: chat.ids[token])


@lru_cache(maxsize=32)
def rendered(template: str | None, named: tuple[tuple[str, str], ...]) -> str:
    """What a template writes for a few short chats; "" for a template that cannot be rendered.

    Args:
        template: Its source.
        named: Role of a token ("bos", "eos", ...) and the token.
    """
    if not template:
        return ""
    variables = {f"{role}_token": token for role, token in named}
    texts = []
    for first in (0, 1):  # some refuse a system turn
        turns = _TURNS[first:]
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            jobs = render_jobs(template, messages, [(len(turns), True), (len(turns) - 1, False)], variables)
        except TemplateError:
            return ""
        texts += [job.text for job in jobs if job.error is None]
    return "\n".join(texts)


def _is_tag(token: str) -> bool:
    return len(token) > 2 and (token[0], token[-1]) in {("<", ">"), ("[", "]")}
