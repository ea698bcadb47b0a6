"""Every code block of the how-to pages runs, page by page, and the examples of the README parse."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_pages_run(page):
    code = "\n".join(blocks(page))
    exec(compile(code, str(page.name), "exec"), {"__name__": page.stem})


def test_readme_parses_and_names_what_exists():
    import cornstarch_hf

    text = (ROOT / "README.md").read_text()
    for code in blocks(ROOT / "README.md"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "cornstarch_hf":
                assert {alias.name for alias in node.names} <= set(cornstarch_hf.__all__)
    assert {"make demo", "make test"} <= set(re.findall(r"make \w+", text))
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (ROOT / "hub_examples" / name).exists()


LOADS = re.compile(r"^.*\bAuto\w+\.from_pretrained\(.*$", re.M)
SPOKEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES, *(ROOT / "cornstarch_hf").rglob("*.py")]
SPOKEN += [ROOT / "cornstarch_hf" / "hub" / "card_template.md", *(ROOT / "hub_examples").glob("*.py")]


@pytest.mark.parametrize("page", [p for p in SPOKEN if p.suffix == ".md"], ids=lambda p: p.stem)
def test_the_package_is_imported_beside_every_load(page):
    for block in re.findall(r"^```\w+\n(.*?)^```", page.read_text(), re.M | re.S):
        trusted = [line for line in LOADS.findall(block) if re.search(r"trust_remote_code=True|\{\{ trust \}\}", line)]
        if len(LOADS.findall(block)) > len(trusted) or "{{ trust }}" in block:
            assert re.search(r"^import cornstarch_hf\b", block, re.M), block


def test_nothing_asks_for_what_anybody_could_register_on_an_index():
    # A bare name, with or without extras; a path, an option or `git+...` names what it means.
    bare = re.compile(r"pip install (?:-\S+ )*[\"'`]?cornstarch[-_]hf\b(?!-\d)|git\+https?://\S*cornstarch[-_]hf", re.I)
    assert bare.search("pip install -U cornstarch_hf[audio]") and not bare.search("pip install ./cornstarch_hf")
    assert {path.name: found for path in SPOKEN if (found := bare.findall(path.read_text()))} == {}


def test_messages_that_the_page_about_sharing_quotes_are_said():
    page = (ROOT / "docs" / "sharing.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page[page.index("## When it fails") :], re.M)
    sources = "".join(path.read_text() for path in (ROOT / "cornstarch_hf").rglob("*.py"))
    quoted = [text for row in rows for text in re.findall(r"`(.+?)`", row)]
    assert len(quoted) > 15 and [text for text in quoted if text not in sources] == []


def test_links_between_pages_and_to_examples_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), (page.name, target)
        for name in re.findall(r"hub_examples/\w+\.py|tests/[\w/]+\.py", text):
            assert (ROOT / name).exists(), (page.name, name)


def test_the_page_about_the_architecture_names_every_room_and_only_what_exists():
    text = (ROOT / "docs" / "architecture.md").read_text()
    package = ROOT / "cornstarch_hf"
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", text, re.M)) == rooms
    files = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    assert len(files) > 25
    for name in files:
        found = [package / name, ROOT / name, *package.glob(f"*/{name}")]
        assert name == "__init__.py" or any(path.is_file() for path in found), name
