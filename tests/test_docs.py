"""The pages: short plain sentences, links that lead somewhere, and an API page that covers every public name."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import beagle

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
AT_THE_ROOT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*AT_THE_ROOT, *DOCS]
MOST_WORDS = 25
IDIOM = (
    "left aside",
    "told",
    "worth a row",
    "room of its own",
    "as it comes by",
    "so many",
    "a row of its own",
    "rival",
)


def ids(page: Path) -> str:
    return page.name


# prose


def without_code(text: str) -> str:
    text = re.sub(r"<!-- (\w+): \S+ -->\n.*?<!-- end of \1 -->", "", text, flags=re.S)  # made by readme_figures.py
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    return re.sub(r"^```.*?^```$", "\n", text, flags=re.M | re.S)


def paragraphs(text: str) -> list[str]:
    """Prose alone: no tables, headings, code or directives. List items are paragraphs of their own."""
    found: list[str] = [""]
    for line in without_code(text).splitlines():
        bare = line.strip()
        if not bare or line.startswith(("|", "#", ":::", "    ", "![")):
            found.append("")
        elif re.match(r"([-*]|\d+\.|:) ", bare):
            found.append(re.sub(r"^([-*]|\d+\.|:)\s+", "", bare))
        else:
            found[-1] += " " + bare
    return [paragraph.strip() for paragraph in found if paragraph.strip()]


def sentences(paragraph: str) -> list[str]:
    plain = re.sub(r"`[^`]*`", "code", paragraph)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain).replace("*", "")
    return re.split(r"(?<=[.!?])\s+", plain)


def test_sentences_are_found():
    text = "# A\n\nOne `a. b` two. Three [four. five](x.md)?\n- Six.\n- Seven\n  eight\n\n| a | b. c |\n\n```sh\nno. no\n```\n"
    assert [sentences(p) for p in paragraphs(text)] == [
        ["One code two.", "Three four.", "five?"],
        ["Six."],
        ["Seven eight"],
    ]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_sentences_are_short(page):
    found = [s for p in paragraphs(page.read_text(encoding="utf-8")) for s in sentences(p)]
    assert found
    assert [s for s in found if len(s.split()) > MOST_WORDS] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_words_are_the_fields(page):
    text = " ".join(paragraphs(page.read_text(encoding="utf-8"))).lower()
    assert [phrase for phrase in IDIOM if re.search(rf"\b{phrase}\b", text)] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_no_figure_is_typed(page):
    """Speed-ups stand in tables that tools/readme_figures.py makes, so that each has a file."""
    text = without_code(page.read_text(encoding="utf-8"))
    assert re.findall(r"\d+(?:\.\d+)?×|\d+\.\d+ times", text) == []


# links


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_files_that_pages_name_exist():
    for page in PAGES:
        for name in re.findall(
            r"`((?:results|configs|benchmarks|tools|examples|tests)/[\w./-]*\w)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = yaml.safe_load(text)["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == sorted([*(page.name for page in DOCS), "CONTRIBUTING.md", "CHANGELOG.md"])


# the API


PUBLIC = [name for name in beagle.__all__ if not name.startswith("_")]


def test_the_api_page_lists_every_public_name():
    listed = re.findall(r"^::: beagle\.(\w+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(PUBLIC)


def documented(doc: str, section: str) -> set[str]:
    """Names in a section of a Google docstring. A section needs an empty line before it, an entry a line of its own."""
    found = re.search(rf"(?:^|\n\n){section}:\n((?:    .*\n|\n)*)", inspect.cleandoc(doc) + "\n")
    return set(re.findall(r"^    \*{0,2}(\w+):", found[1], re.M)) if found else set()


def callables() -> dict[str, object]:
    """Public functions, and the public methods of public classes."""
    found: dict[str, object] = {}
    for name in PUBLIC:
        value = getattr(beagle, name)
        if not inspect.isclass(value):
            found[name] = value
            continue
        for key, member in vars(value).items():
            if inspect.isfunction(inspect.unwrap(member)) and not key.startswith("_"):
                found[f"{name}.{key}"] = getattr(value, key)
    return found


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name):
    value = getattr(beagle, name)
    assert inspect.getdoc(value)
    if is_dataclass(value):
        assert documented(value.__doc__, "Attributes") >= {field.name for field in fields(value)}


@pytest.mark.parametrize("name", list(callables()))
def test_parameters_of_public_functions_are_documented(name):
    function = callables()[name]
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "args", "kwargs")]
    doc = inspect.getdoc(function) or ""
    assert doc, name
    assert documented(doc, "Args") >= set(parameters)


@pytest.mark.parametrize("name", sorted({*PUBLIC, *callables()}))
def test_sections_of_docstrings_are_recognised(name):
    """Tools read a section only where an empty line comes before it."""
    value = callables().get(name) or getattr(beagle, name)
    doc = inspect.cleandoc(value.__doc__ or "")
    for section in ("Args", "Returns", "Raises", "Attributes"):
        for found in re.finditer(rf"^{section}:$", doc, re.M):
            assert found.start() == 0 or doc[: found.start()].endswith("\n\n"), section
