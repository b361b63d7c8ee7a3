"""Source, pages and examples use the field's words and plain English."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [
    *sorted((ROOT / "src").rglob("*.py")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "docs/theme").glob("*.py")),
    *(path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in (".py", ".md", ".ipynb", ".toml")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]
PATTERNS = {
    r"(some|no|every|any)body|whoever": "name the person or part: a client, the caller, all users",
    r"one's own|of (its|their|my|your) own\b(?! accord)": "custom, your own, its own X",
    r"for ever": "permanently, always",
    r"put by": "store, save",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"(take|takes|taken|taking|took) (up|over)": "restore, apply, replace",
    r"is none of": "must be ..., got ...",
    r"(is|are) no [a-z]+( of [a-z ]+)?:": "must be ..., got ...",
    r"(the|a|this|at|same) door|door's": "upload validation; validation before training",
    r"letters?": "request, message; for 'to the letter' say exactly",
    r"objections?": "check_upload",
    r"Method\.expects|`expects`": "upload_spec",
    r"in place of": "instead of",
    r"at rest": "in eval mode (running statistics fixed)",
    r"honest(ly)?": "well-formed, benign",
    r"(un)?park(s|ed|ing)?": "offload",
    r"attendance": "client sampling",
    r"oracles?": "upper bound, all data (centralised)",
    r"controls? (without|that|which|and|on|do|do not|beside|needs?)|(the|these|closest|honest) controls?|Control:": (
        "baseline, training-free baseline"
    ),
    r"contract tests?|the contract|contract of": "fedlscl.testing.check_method",
    r"dream(s|er|ed)?": "generator, synthetic batch",
    r"parcels?": "broadcast",
    r"(reading|writing) factors?": "A (down-projection), B (up-projection)",
    r"quarantined?": "rejected",
    r"(the|in|of the|in this) house": "repository, package",
}
ALLOWED = {
    ("docs/deployment.md", "letter"): 0,
}
"""Hits that are meant, by file and text; none so far needs one."""


def hits(text):
    """Line number, text and remedy of each word that another one should replace."""
    for pattern, remedy in PATTERNS.items():
        for found in re.finditer(rf"\b(?:{pattern})(?!\w)", text, re.IGNORECASE):
            yield text.count("\n", 0, found.start()) + 1, found[0], remedy


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_are_those_of_the_field(path):
    found = [f"line {line}: {text!r}, say: {remedy}" for line, text, remedy in hits(path.read_text())]
    assert not found, "\n".join(found)
