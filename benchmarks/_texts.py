"""Text that every Python installation has: the language reference's topics and the descriptions of packages.

It makes the demo independent of any network. It is technical English; a result on it says little about other text.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import pydoc_data.topics

#: Packages parofx needs anyway and whose descriptions are mostly prose.
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "typer", "rich", "sympy", "tqdm")
#: One document in so many is kept for evaluation.
_HELD_OUT = 4


def calibration_and_evaluation() -> tuple[list[str], list[str]]:
    """Return two lists of documents that share no paragraph."""
    documents = {f"topic {name}": text for name, text in sorted(pydoc_data.topics.topics.items())}
    for name in PACKAGES:
        documents[f"package {name}"] = importlib.metadata.metadata(name).get_payload()
    calibration: list[str] = []
    evaluation: list[str] = []
    seen: set[str] = set()
    for name, text in documents.items():
        # Topics quote one another; a paragraph belongs to the first document that has it.
        paragraphs = [part for part in text.split("\n\n") if part.strip() and part.strip() not in seen]
        seen.update(part.strip() for part in paragraphs)
        held_out = hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT == 0
        (evaluation if held_out else calibration).append("\n\n".join(paragraphs))
    return [text for text in calibration if text], [text for text in evaluation if text]
