"""README and docs/: every command and every block of code runs, in the lane it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import pages

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("*.md"))]  # fmt: skip
BLOCKS = {page.name if page.parent != PAGES[-1].parent else str(page): pages.blocks(page)
          for page in PAGES}  # fmt: skip
SMALL = {name: blocks for name, blocks in BLOCKS.items() if not all(b.linux for b in blocks)}
LINUX = {name: blocks for name, blocks in BLOCKS.items() if any(b.linux for b in blocks)}


def run(blocks: list[pages.Block], directory: Path) -> None:
    directory.mkdir()
    for block in blocks:
        pages.run(block, directory)


@pytest.mark.needs_kvm
@pytest.mark.one_lane
@pytest.mark.parametrize("name", SMALL)
def test_a_page_with_small_guests(name: str, tmp_path: Path) -> None:
    """Files of a page's Linux blocks are written too: blocks of both kinds may use them."""
    run([b for b in BLOCKS[name] if not b.linux or "file" in b.comments], tmp_path / "reader")


@pytest.mark.needs_linux_kvm
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LINUX)
def test_a_page_with_linux(name: str, tmp_path: Path) -> None:
    run([b for b in BLOCKS[name] if b.linux or "file" in b.comments], tmp_path / "reader")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_command_stands_outside_of_a_block(page: Path) -> None:
    assert pages.unfenced(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    import re

    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", ["ci.md"])
def test_files_for_a_ci_are_what_they_claim(name: str) -> None:
    import tomllib

    import yaml

    for block in BLOCKS[name]:
        if block.language == "yaml":
            text = str(yaml.safe_load(block.code))
            assert "vmm doctor" in text and "--vmm-require" in text
        elif block.language == "toml":
            assert "/dev/kvm" in str(tomllib.loads(block.code))


def test_most_pages_run() -> None:
    assert sum(map(len, BLOCKS.values())) > 30
    assert len(SMALL) >= 8


@pytest.mark.parametrize(("text", "problem"), [
    ("```ruby\nputs 1\n```\n", "nobody runs blocks of ruby"),
    ("```toml\na = 1\n```\n", "nobody runs blocks of toml"),
])  # fmt: skip
def test_a_block_that_nobody_runs_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(text)
    with pytest.raises(AssertionError, match=problem):
        pages.blocks(tmp_path / "p.md")


@pytest.mark.parametrize("text", [
    "```sh\nfalse\n```\n", "```sh\necho $unset\n```\n", "```python\nraise SystemExit(3)\n```\n",
    "```sh\necho a\n```\n\n```text\nb\n```\n", "```console\n$ echo a\nb\n```\n",
    "<!-- status: 2 -->\n```sh\ntrue\n```\n", "```console\n$ vmm nonsense\n```\n",
])  # fmt: skip
def test_a_page_that_is_wrong_fails(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(text)
    (tmp_path / "d").mkdir()
    with pytest.raises(AssertionError):
        for block in pages.blocks(tmp_path / "p.md"):
            pages.run(block, tmp_path / "d")


def test_a_page_in_order(tmp_path: Path) -> None:
    (tmp_path / "p.md").write_text(
        "<!-- file: a/b.txt -->\n```text\nhello\n```\n\n```sh\nmv a/b.txt c\n```\n"
        "```console\n$ cat c; echo more; echo end\nhello\n...\nend\n$ false\n```\n"
        "<!-- no run: it is made up -->\n```sh\nfalse\n```\n"
        "<!-- status: 3 -->\n```sh\nexit 3\n```\n"
    )
    found = pages.blocks(tmp_path / "p.md")
    assert len(found) == 4
    run(found, tmp_path / "d")
    (tmp_path / "q.md").write_text("see\n\n    vmm run x\n\n```text\n    vmm run y\n```\n")
    assert pages.unfenced(tmp_path / "q.md") == ["q.md:3: vmm run x"]
