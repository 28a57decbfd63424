"""The README's table of methods is the registry; `python tests/docs/test_readme.py` writes it anew."""

from pathlib import Path

from weightsmith.registry import cards

README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- methods: written by tests/docs/test_readme.py -->\n", "<!-- end of methods -->"


def table():
    lines = ["| Method | For | Evidence | Paper |", "|---|---|---|---|"]
    for card in cards():
        paper = f"arXiv:{card.paper}" if card.paper else ""
        lines.append(
            f"| [`{card.id}`](docs/methods/{card.id}.md) | {card.purpose} | {card.verdict} | {paper} |"
        )
    return "\n".join(lines) + "\n"


def parts():
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    inside, _, after = rest.partition(END)
    return before, inside, after


def test_the_readme_lists_the_registry():
    assert parts()[1] == table()


def test_each_method_has_its_page():
    for card in cards():
        assert (README.parent / "docs" / "methods" / f"{card.id}.md").is_file(), card.id


if __name__ == "__main__":
    before, _, after = parts()
    README.write_text(before + START + table() + END + after, encoding="utf-8")
