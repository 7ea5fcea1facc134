"""Pages and plots of the documentation site that lie outside docs/ (see ``hooks`` in mkdocs.yml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # at the root, where hosts of repositories look for them
OUTSIDE = re.compile(r"(!\[[^\]]*\]\()\.\./(results/[^)]+\.png)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, and the plots of results/ that pages show."""
    shown = {name for page in ROOT.glob("docs/*.md") for _, name in OUTSIDE.findall(page.read_text(encoding="utf-8"))}
    for name in (*PAGES, *sorted(shown)):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site, where docs/ is the root."""
    markdown = OUTSIDE.sub(r"\1\2)", markdown)
    return markdown.replace("](docs/", "](") if page.file.src_uri in PAGES else markdown
