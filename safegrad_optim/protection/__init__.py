"""Whether a fine-tuned model still refuses what the aligned one does, in the course of a run and after it.

In come models and prompts; out comes which refusals are kept, with what chance explains. `ProtectionCheck`
watches a run, `compare` judges any two models, and `safegrad-check` does so from the command line.

>>> from safegrad_optim.protection import fewest_lost, wilson_interval
>>> fewest_lost(24)
7
>>> low, high = wilson_interval(95, 100)
>>> round(low, 2), round(high, 2)
(0.89, 0.98)
"""

from safegrad_optim.protection._check import ProtectionCheck
from safegrad_optim.protection._compare import Answers, Comparison, Share, answers, compare
from safegrad_optim.protection._found import Protection, ProtectionLostError
from safegrad_optim.protection._leak import fewest_lost, wilson_interval

__all__ = ["Answers", "Comparison", "Share", "answers", "compare"]
__all__ += ["Protection", "ProtectionCheck", "ProtectionLostError", "fewest_lost", "wilson_interval"]
