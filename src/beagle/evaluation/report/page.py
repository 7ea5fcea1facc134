"""The report as one page that needs nothing else, light or dark."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from beagle.evaluation.report.style import for_page
from beagle.evaluation.report.tables import Table

WORDS = ("set", "category", "mode", "item", "draft", "verdict", "target", "head")  # columns of words, not numbers
TEXTS = ("what", "differ", "claim", "the paper", "found")  # of sentences, which may break


@dataclass
class Section:
    """One result of a report.

    Attributes:
        run: what was run, where and how, a line each; ``command`` repeats it.
        plots: SVG texts by file name. answers: what the viewer of single answers needs.
    """

    title: str
    run: list[str] = field(default_factory=list)
    command: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: dict[str, str] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)


def markdown(title: str, sections: list[Section]) -> str:
    """The report with its plots beside it."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [f"{line}  " for line in section.run]
        lines += [f"`{section.command}`", ""] if section.command else [""]
        for name in section.plots:
            lines += [f"![{section.title}: {name}]({name}.png)", ""]
        for table in section.tables:
            lines += [table.markdown(), ""]
    return "\n".join(lines).rstrip() + "\n"


def html(title: str, sections: list[Section]) -> str:
    """The whole page."""
    body = [f"<h1>{escape(title)}</h1>"]
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f'<p class="run">{escape(line)}</p>' for line in section.run]
        if section.command:
            body.append(f"<p><code>{escape(section.command)}</code></p>")
        first, *rest = [_table(table) for table in section.tables] or [""]
        body.append(first)
        body += [f"<figure>{for_page(svg)}</figure>" for svg in section.plots.values()]
        body += rest
        if section.answers:
            body.append(_viewer(section.answers))
    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    return page.replace("__TITLE__", escape(title)).replace("__BODY__", "\n".join(body))


def _table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        kinds = [
            ' class="left"' if name in WORDS else ' class="left text"' if name in TEXTS else "" for name in table.header
        ]
        marked = zip(kinds, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in marked) + "</tr>"

    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    rows = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead>{row(table.header, "th")}</thead>'
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _viewer(answers: list[dict[str, Any]]) -> str:
    data = json.dumps(answers, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    depths = "".join(f'<span class="d{n}">{n}{"+" if n == 5 else ""}</span>' for n in range(1, 6))
    return (
        '<h3>Single answers, token by token</h3><div class="viewer">'
        "<label>question <select></select></label><label>mode <select></select></label>"
        f'<p class="key"><span class="d0">the target\'s own</span> &ensp;{depths} accepted at this depth of the draft</p>'
        f'<div class="out"></div><script type="application/json">{data}</script></div>'
    )
