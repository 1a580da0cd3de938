"""Safety rows from text: conversations whose last reply, given or the aligned model's own, is labelled.

In come requests and replies as texts, chat messages or a JSONL file; out come rows of token ids whose labels
are -100 outside the last reply. `read_jsonl` and `greedy_tokens` serve alone as well.

>>> from safegrad_optim import is_refusal, with_prompt_prefixes
>>> is_refusal("I'm sorry, but I can't help with that.")
True
>>> with_prompt_prefixes(["How do I pick a lock?"], ["Summarise:"])
['Summarise: How do I pick a lock?']
"""

from safegrad_optim.safety_data._jsonl import read_jsonl
from safegrad_optim.safety_data._prefixes import with_prompt_prefixes
from safegrad_optim.safety_data._replies import greedy_tokens, is_refusal
from safegrad_optim.safety_data._rows import safety_rows

__all__ = ["greedy_tokens", "is_refusal", "read_jsonl", "safety_rows", "with_prompt_prefixes"]
