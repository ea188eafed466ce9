"""A list of messages in, text and ids by the model's own template out, and which of the ids are the assistant's."""

from lapis.text.chat.chat import encode_chat as encode_chat
from lapis.text.chat.chat import encode_prompt as encode_prompt
from lapis.text.chat.chat import render as render
