"""Source, pages and examples use the field's words and plain English."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "docs/pictures/idea.svg",
    *sorted((ROOT / "docs").rglob("*.py")),
    *(
        path
        for kind in ("py", "md", "ipynb", "toml", "yaml")
        for path in sorted((ROOT / "examples").rglob(f"*.{kind}"))
    ),
]
EVERYWHERE = {
    r"(some|no|every|any)body|whoever": "the part or person: a client, the caller, all users",
    r"one's own": "your own, custom",
    r"for ever": "permanently",
    r"put by": "save, store",
    r"(go|goes|going|went|gone) on": "continue, resume",
    r"(take|takes|taking|took|has taken|have taken) (up|over)|taken up": "restore, apply, load",
    r"is none of": "must be ..., got ...",
    r"(?-i:is no) \w+( of [\w ]+)?:": "must be ..., got ...",
    r"(the|a|at|same) doors?|door's": "upload validation; validation before training",
    r"letters?": "request, message; exactly",
    r"objections?|Method\.expects|`expects`": "check_upload, upload_spec",
    r"in place of": "instead of",
    r"at rest": "in eval mode",
    r"honest(ly)?": "well-formed, benign",
    r"(un)?park(s|ed|ing)?": "offload",
    r"attendance": "client sampling",
    r"oracles?": "all data (centralised)",
    r"(the|honest|closest|two) controls?|controls (that|without|which|on)|control:": "baseline, training-free baseline",
    r"the contract|contract of": "the checks of fedlscl.testing",
    r"dream(s|er|ed)?": "synthetic batch, generator",
    r"parcels?": "broadcast",
    r"(reading|writing) factors?": "A (down-projection), B (up-projection)",
}
"""What not to write, as regular expressions between word boundaries, and what to write instead."""
ON_PAGES = {
    r"data\.concentration": "data.dirichlet_alpha",
    r"trainer\.norm_factor|norm_factor": "trainer.max_norm_ratio",
    r"`(seen|task)` (accuracy|mask)|mask `?(seen|task)`?|under `?(seen|task)`?|`seen`": "class-IL, task-IL",
    r"fedlscl\.contract": "fedlscl.testing",
}
"""Former names, which the source may still know to point to the new ones."""


def hits(text, patterns):
    """Line number, text and replacement of each hit."""
    for pattern, better in patterns.items():
        for found in re.finditer(rf"(?<!\w)(?:{pattern})(?!\w)", text, re.IGNORECASE):
            yield text.count("\n", 0, found.start()) + 1, found[0], better


@pytest.mark.parametrize("path", SOURCE + PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_are_those_of_the_field(path):
    patterns = EVERYWHERE if path in SOURCE else EVERYWHERE | ON_PAGES
    found = [f"line {line}: {text!r}, better: {better}" for line, text, better in hits(path.read_text(), patterns)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ("shrinkage 2 is no share: choose up to 1", True),
        ("a group is no duplicate of its own options: it", True),
        ("noise: 0 is NO noise: uploads are not private", False),
        ("refused at the door", True),
        ("outdoors and next door", False),
        ("Honest controls: what it gives", True),
        ("Flower's control API", False),
        ("the maximum is taken over the classes", False),
        ("Take over the average", True),
        ("the rest of the run", False),
        ("BatchNorm at rest", True),
        ("an oracle_signal option", False),
    ],
)
def test_the_patterns_find_words_and_leave_others(text, is_found):
    assert bool(list(hits(text, EVERYWHERE))) == is_found
