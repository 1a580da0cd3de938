"""Sequences of words, and those of AdvBench as hashes: what is written for this project must share none.

python -m tests.support.sequences advbench_goals.txt    # one request a line; prints the hashes
"""

import hashlib
import re
import sys
from pathlib import Path

ADVBENCH = Path(__file__).parents[1] / "safety_data" / "advbench_sequences.txt"
ADVBENCH_WORDS = 5


def sequences(text, length):
    """All sequences of so many words in a text, in lower case; a Chinese character is a word."""
    words = re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:'[^\W_]+)?", text.lower())
    return {" ".join(words[start : start + length]) for start in range(len(words) - length + 1)}


def hashed(sequence):
    return hashlib.sha256(sequence.encode()).hexdigest()[:12]


if __name__ == "__main__":
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    print("\n".join(sorted({hashed(found) for line in lines for found in sequences(line, ADVBENCH_WORDS)})))
