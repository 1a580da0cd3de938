"""Safety rows from text: conversations whose last reply, given or the aligned model's own, is labelled.

In come requests and replies as texts, chat messages or a JSONL file; out come rows of token ids whose labels
are -100 outside the last reply. `read_jsonl` and `greedy_tokens` serve alone as well. Whoever has no unsafe
requests takes those in this package:

>>> from safegrad_optim import shipped_requests
>>> sorted(shipped_requests()[0])
['category', 'form', 'language', 'lookalike', 'request', 'split', 'topic']

>>> from safegrad_optim import is_refusal, with_prompt_prefixes
>>> is_refusal("I'm sorry, but I can't help with that.")
True
>>> with_prompt_prefixes(["How do I pick a lock?"], ["Summarise:"])
['Summarise: How do I pick a lock?']
"""

from safegrad_optim.safety_data._audit import RowAudit, audit_rows
from safegrad_optim.safety_data._jsonl import read_jsonl
from safegrad_optim.safety_data._openings import openings, reply_log_probs
from safegrad_optim.safety_data._prefixes import with_prompt_prefixes
from safegrad_optim.safety_data._refusals import is_refusal
from safegrad_optim.safety_data._refused import RefusedPrompts, refused_prompts
from safegrad_optim.safety_data._replies import greedy_tokens
from safegrad_optim.safety_data._rows import safety_rows
from safegrad_optim.safety_data._shipped import shipped_harmless_prompts, shipped_requests
from safegrad_optim.safety_data._sources import SafetySources, safety_sources
from safegrad_optim.safety_data._template import chat_tokenizer, prompt_tokens

__all__ = ["greedy_tokens", "is_refusal", "read_jsonl", "safety_rows", "shipped_harmless_prompts"]
__all__ += ["RefusedPrompts", "SafetySources", "refused_prompts", "safety_sources", "shipped_requests"]
__all__ += ["RowAudit", "audit_rows"]
__all__ += ["chat_tokenizer", "openings", "prompt_tokens", "reply_log_probs"]
__all__ += ["with_prompt_prefixes"]
