"""What pages of documentation hold for a reader to run: fenced blocks of Python, and command lines."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tree import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")])
# What a line of commands begins with, behind variables such as PYTHONPATH=tests. Other indented lines are drawings.
PROGRAMS = ("make", "pip", ".venv/bin/pip", "python", "python3", ".venv/bin/python", "pytest", "res2net-fused", "git", "bash")
VARIABLE = r"[A-Z_]+=\S+"
COMMAND = re.compile(rf"(?:{VARIABLE}\s+)*(?:{'|'.join(map(re.escape, PROGRAMS))})(?:\s|$)")

# What the blocks take for granted: a user's images and, for the operator, x (N, s*w, H, W) with w = 26 and s = 4.
PREAMBLE = """
import torch
torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
x = torch.randn(2, 4 * 26, 14, 14)
weights = [torch.randn(26, 26, 3, 3) / 15 for _ in range(3)]
biases = [torch.randn(26) for _ in range(3)]
"""


@dataclass(frozen=True)
class Excerpt:
    """A piece of a page: its text, and the line that it begins at."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def fenced(page: Path, language: str) -> list[Excerpt]:
    """The blocks between ```language and ```, in order."""
    text, name = page.read_text(), str(page.relative_to(ROOT))
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)
    return [Excerpt(name, text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def command_lines(page: Path) -> list[Excerpt]:
    """Every command: indented lines, lines of ```bash, ```sh and ```console blocks, and what stands between backticks."""
    name, found, prose = str(page.relative_to(ROOT)), [], ""
    fence: str | None = None
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        candidates = []
        if "<!-- results:begin" in line:
            fence = "results"  # made by the commands of their time
        elif "results:end -->" in line:
            fence = None
        elif line.startswith("```"):
            fence = None if fence is not None else line.removeprefix("```").strip()
        elif fence in ("bash", "sh", "shell", "console"):
            candidates = [line.strip().removeprefix("$ ")]
        elif fence is None and line.startswith("    "):
            candidates = [line.strip()]
        elif fence is None and line.strip():
            prose = f"{prose} {line}".lstrip()  # what stands between backticks may go on in the next line
            candidates = re.findall(r"`([^`]+)`", prose)
            prose = prose[prose.rindex("`") :] if prose.count("`") % 2 else ""
        if not line.strip():
            prose = ""
        for candidate in candidates:
            words = re.sub(r"\s+#\s.*$", "", candidate)  # a comment behind the command
            if COMMAND.match(words):
                found.append(Excerpt(name, number, words))
    return found
