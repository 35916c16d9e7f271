"""The pages of documentation against the tree: links, paths, names, environment variables and quoted messages are there."""

import ast
import re
from pathlib import Path

import pytest
from pages import PAGES, ROOT

import res2net_fused.models
from res2net_fused.backends.base import BACKENDS
from res2net_fused.backends.policy import EXPERIMENTAL

NEW_PAGES = [page for page in PAGES if page.parent == ROOT / "docs"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
SOURCES = [*ROOT.glob("res2net_fused/**/*.py"), *ROOT.glob("csrc/**/*.*"), ROOT / "setup.py"]
# Folders that a path in backticks may be meant from; pages in docs/ and the README name paths from the top.
FOLDERS = ("", "res2net_fused", "benchmarks")


def without_code(text: str) -> str:
    """The text without blocks of code, indented or fenced."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """The headings' anchors, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_all_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md"} <= set(NAMES)
    assert [page.stem for page in NEW_PAGES] == [
        "api", "architecture", "backends", "benchmarking", "deployment", "install", "kernels", "mathematics", "results",
        "stand_in_card", "training", "troubleshooting", "tuning", "usage",
    ]  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if not re.match(r"\w+:", link)]
    assert links or page not in NEW_PAGES, "a page of docs/ leads to the others"
    for link in links:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target.relative_to(ROOT)}"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading in {target.name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_files_exist(page):
    text = re.sub(r"<!-- results:begin.*?results:end -->", "", page.read_text(), flags=re.S)
    named = re.findall(r"`([\w./-]+/[\w./-]*|[\w-]+\.(?:py|md|cpp|h|cuh|cu|toml))`", without_code(text))
    folders = FOLDERS if page not in NEW_PAGES else ("",)
    top = ("res2net_fused", "csrc", "benchmarks", "tests", "examples")
    file_names = {path.name for folder in top for path in ROOT.glob(f"{folder}/**/*")}
    for name in named:
        if name.startswith(("build/", "dist/", "results/")) or "<" in name:
            continue  # what a run writes
        found = any((ROOT / folder / name).exists() for folder in folders) or (page.parent / name).exists()
        alone = "/" not in name and page not in NEW_PAGES and name in file_names
        assert found or alone, f"`{name}` is nowhere"


def variables(text: str) -> set[str]:
    return set(re.findall(r"RES2NET_FUSED_[A-Z_]+", text))


def first_cells(page: str, heading: str) -> list[str]:
    """The first column of all tables below a heading, without backticks."""
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")]
    return [row.strip("`") for row in rows if row.startswith("`")]


def test_environment_variables_are_documented():
    read = set().union(*(re.findall(r'"(RES2NET_FUSED_[A-Z_]+)"', path.read_text()) for path in SOURCES))
    assert len(read) >= 7, "the search finds nothing any more"
    assert set(first_cells("docs/backends.md", "Environment variables")) == read
    assert "(docs/backends.md)" in (ROOT / "README.md").read_text().split("environment variables", 1)[0]
    for page in PAGES:
        assert variables(page.read_text()) <= read, page


@pytest.mark.parametrize("page, heading", [("README.md", "What runs where"), ("docs/backends.md", "What each can do")])
def test_tables_of_abilities_have_every_backend(page, heading):
    section = (ROOT / page).read_text().split(f"\n## {heading}\n")[1]
    head = next(line for line in section.splitlines() if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", head)) == set(BACKENDS) - {"auto"}
    assert set(re.findall(r"`(\w+)` \(experimental\)", head)) == set(EXPERIMENTAL)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_python_on_pages_is_python_and_its_names_are_public(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rf":
                assert node.attr in res2net_fused.__all__, node.attr
    for name in re.findall(r"\brf\.(\w+)", page.read_text()):
        assert name in res2net_fused.__all__, name


def test_the_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    modules = {"res2net_fused": res2net_fused, "res2net_fused.models": res2net_fused.models}
    public = {f"{name}.{item}" for name, module in modules.items() for item in module.__all__}
    assert sorted(re.findall(r"^::: (\S+)$", page, re.M)) == sorted(public)


def sources() -> str:
    """The package's text with literals that lie on several lines joined, as a user meets them."""
    text = "\n".join(path.read_text() for path in SOURCES)
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_messages_of_troubleshooting_are_the_packages_own():
    text = sources()
    headings = ("A block does not run fused", "Errors", "A GPU that is not used", "Installing")
    quoted = [message for heading in headings for message in first_cells("docs/troubleshooting.md", heading)]
    assert len(quoted) > 40
    missing = [message for message in quoted if message not in text]
    assert not missing, missing


@pytest.mark.parametrize("page", NEW_PAGES, ids=lambda page: page.name)
def test_drawings_keep_their_lines(page):
    """Tabs, and characters that are not one column wide, would move what stands behind them."""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        drawing = line.startswith("    ")
        assert "\t" not in line and line.isascii(), f"line {number}: {line}"
        assert not drawing or len(line) <= 136, f"line {number} is {len(line)} wide"
