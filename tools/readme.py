"""Make README.md from the site's home page, nbs/index.ipynb.

    python tools/readme.py            # write README.md
    python tools/readme.py --check    # exit 1 if it is not what the home page gives
"""
import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from book import ROOT, directives

NOTE = "<!-- Made from nbs/index.ipynb by tools/readme.py: edit the notebook, then run `make prepare`. -->\n\n"
LINK = re.compile(r'(\]\(|(?:src|href)=")(?![a-z][a-z0-9+.-]*:|#|/)([^)\s"]+)', re.IGNORECASE)


def relative_to_root(markdown):
    "Links of a page in nbs/ as seen from the repository's top; code blocks are left as they are"
    parts = re.split(r"(^```.*?^```[^\n]*$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if p.startswith("```") else LINK.sub(r"\1nbs/\2", p) for p in parts)


def readme(root=ROOT):
    "The text of README.md"
    nb = nbformat.read(Path(root) / "nbs/index.ipynb", as_version=4)
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            marks = directives(cell.source)
            if "hide" in marks:
                continue
            code = [line for line in cell.source.splitlines() if not re.match(r"\s*#\s*\|", line)]
            cell.source = "\n".join(code).strip()
        cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean drops it; it names the language of code blocks
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        raise ValueError("nbs/index.ipynb has pictures among its outputs; README.md can only show files of nbs/images")
    text = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return NOTE + relative_to_root(re.sub(r"\n{3,}", "\n\n", text)) + "\n"


def main():
    parser = argparse.ArgumentParser(description="Make README.md from nbs/index.ipynb")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of step")
    args = parser.parse_args()
    path = ROOT / "README.md"
    try:
        text = readme()
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if args.check:
        sys.exit("README.md is not what nbs/index.ipynb gives: run make prepare")
    path.write_text(text, encoding="utf-8")
    print("README.md written")


if __name__ == "__main__":
    main()
