"""Adds to the documentation site what lies outside docs/: README and its like, and linked files."""

from __future__ import annotations

import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"} | {
    name: name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
}
_LINK = re.compile(r"(?<=\]\()([^)#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate the pages of the repository's top folder, and copy every other file they link to."""
    for name, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    pages = [ROOT / name for name in PAGES] + sorted((ROOT / "docs").rglob("*.md"))
    linked = {
        _in_repository(page, target)
        for page in pages
        for target in _LINK.findall(page.read_text(encoding="utf-8"))
    }
    for path in sorted(linked):
        if path not in PAGES and not path.startswith("docs/") and (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let the links of a page lead to where the site has their targets."""
    source = page.file.src_uri
    original = {place: name for name, place in PAGES.items()}.get(source, f"docs/{source}")

    def in_site(match: re.Match[str]) -> str:
        target = _in_repository(ROOT / original, match[0])
        return os.path.relpath(PAGES.get(target, target.removeprefix("docs/")), Path(source).parent)

    return _LINK.sub(in_site, markdown)


def _in_repository(page: Path, target: str) -> str:
    return os.path.normpath(page.parent.relative_to(ROOT) / target)
