"""A score of a caption against a reference that needs no model."""

import re
from collections import Counter


def token_f1(generated: str, reference: str) -> float:
    """F1 of the words of two texts, 0 to 1, in any case and order; a word counts as often as it occurs.

    Words are runs of letters and digits. Of two texts without words the score is 1, of one it is 0.
    """
    words = [Counter(re.findall(r"\w+", text.lower())) for text in (generated, reference)]
    total = words[0].total() + words[1].total()
    return 2 * (words[0] & words[1]).total() / total if total else 1.0
