"""Hooks of MkDocs: pages may link to files outside docs/, as GitHub shows them, and name public objects by their public path.

Pages of the repository become pages of the site; any other file that is linked is copied into it under files/.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
OPTIONAL = "architecture.md"  # in the navigation once it is written
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")
_OBJECT = re.compile(r"^::: ([\w.]+)$", re.M)


def on_config(config: Any) -> Any:
    """Leave out the page that is not written yet."""
    if not (ROOT / "docs" / OPTIONAL).is_file():
        for section in config.nav:
            for entries in section.values():
                if isinstance(entries, list):
                    entries[:] = [entry for entry in entries if OPTIONAL not in entry.values()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The repository's own pages, and the files that pages link to."""
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    copied = set()
    for file in files.documentation_pages():
        for link, _ in _LINK.findall(file.content_string):
            path = _in_repository(file.src_uri, link)
            if path is not None and _uri(path).startswith("files/"):
                if not (ROOT / path).is_file():
                    raise PluginError(f"{file.src_uri} links to {link}, and there is no file {path}")
                copied.add(path)
    for path in sorted(copied):
        files.append(File.generated(config, _uri(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them; objects by the module that defines them, under their public name."""

    def link(match: re.Match[str]) -> str:
        path = _in_repository(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        return f"]({posixpath.relpath(_uri(path), posixpath.dirname(page.file.src_uri) or '.')}{match[2] or ''})"

    def public(match: re.Match[str]) -> str:
        package, _, name = match[1].rpartition(".")
        return f"::: {definition(package, name)}\n    options:\n      heading: {match[1]}\n      toc_label: {name}"

    return _OBJECT.sub(public, _LINK.sub(link, markdown))


def definition(package: str, name: str) -> str:
    """The path of what `package` imports as `name`: a submodule of the same name would hide it from static analysis."""
    folder = ROOT.joinpath(*package.split("."))
    if not folder.is_dir():
        return f"{package}.{name}"
    for node in ast.parse((folder / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(f"{package}.{node.module}", alias.name)
    return f"{package}.{name}"


def _in_repository(uri: str, link: str) -> str | None:
    """The path from the top of what a page links to, None for a link to another host."""
    if re.match(r"\w+:", link):
        return None
    source = next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    if path.startswith(".."):
        raise PluginError(f"{uri} links to {link}, which is outside the repository")
    return path


def _uri(path: str) -> str:
    """Where the site has a file of the repository."""
    return PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else f"files/{path}")
