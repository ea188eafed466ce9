"""Files and data sets in, documents, chats, pairs, labeled texts and pictures out, each with its file and line."""

from lapis.text.corpus.corpus import chats as chats
from lapis.text.corpus.corpus import documents as documents
