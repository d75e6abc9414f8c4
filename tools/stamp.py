"""Stamp into the notebooks what is the same in each of them and derives from settings.ini.

A chapter gets, under its title, a Colab badge and a hidden cell that installs the package when in Colab; the home page
gets its badges. Stamped cells are known by their ids, and only they are replaced. The sentence under a title is turned
into a quotation, `> sentence`: nbdev makes that the page's description and drops anything else in the title's cell, so
what else stands there moves to a cell of its own.

    python tools/stamp.py                           # stamp every page
    python tools/stamp.py nbs/3_data/*.ipynb        # stamp these
    python tools/stamp.py --check                   # exit 1 and name the pages that are out of step
"""
import argparse
import sys
from pathlib import Path

from book import ROOT, pages, read_notebook, settings, write_notebook

STAMPED = ("colab-badge", "colab-install", "badges")
COLAB = "https://colab.research.google.com"
INSTALL = '''#| hide
#| eval: false
# In Colab: install the package. Elsewhere this does nothing.
import sys

if "google.colab" in sys.modules:
    %pip install -q "git+{git_url}"'''


def markdown(id, source):
    return {"cell_type": "markdown", "id": id, "metadata": {}, "source": source}


def code(id, source):
    return {"cell_type": "code", "execution_count": None, "id": id, "metadata": {}, "outputs": [], "source": source}


def chapter_cells(cfg, page):
    url = f"{COLAB}/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/nbs/{page.as_posix()}"
    return [
        markdown("colab-badge", f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({url})"),
        code("colab-install", INSTALL.format(git_url=cfg["git_url"])),
    ]


def home_cells(cfg):
    git, site = cfg["git_url"], cfg["doc_host"] + cfg["doc_baseurl"]
    return [markdown("badges", "\n".join([
        f"[![test]({git}/actions/workflows/test.yml/badge.svg)]({git}/actions/workflows/test.yml)",
        f"[![docs]({git}/actions/workflows/docs.yml/badge.svg)]({site})",
        f"[![licence: MIT](https://img.shields.io/badge/licence-MIT-blue.svg)]({git}/blob/{cfg['branch']}/LICENSE)",
    ]))]


def title_cells(cell, path):
    "`# Title` with its sentence as `> sentence` on one line; what else stood there, as a second cell"
    title, _, rest = cell["source"].strip().partition("\n")
    if cell["cell_type"] != "markdown" or not title.startswith("# "):
        raise ValueError(f"{path}: the first cell must be `# Title` and a sentence under it; it begins {title[:40]!r}")
    sentence, _, more = rest.strip().partition("\n\n")
    sentence = " ".join(line.lstrip("> ").strip() for line in sentence.splitlines())
    cell = {**cell, "source": f"{title.strip()}\n\n> {sentence}" if sentence else title.strip()}
    return [cell, markdown("opening", more.strip())] if more.strip() else [cell]


def stamped(path, cfg, page):
    "The notebook as it should be"
    nb = read_notebook(path)
    cells = [c for c in nb["cells"] if c.get("id") not in STAMPED]
    if not cells:
        raise ValueError(f"{path} is empty")
    title, *opening = title_cells(cells[0], path)
    taken = {c.get("id") for c in cells}
    for cell in opening:
        cell["id"] = next(f"opening{n}" for n in ("", *range(1, len(cells) + 1)) if f"opening{n}" not in taken)
    new = home_cells(cfg) if page.as_posix() == "index.ipynb" else chapter_cells(cfg, page)
    return {**nb, "cells": [title, *new, *opening, *cells[1:]]}


def stamp(root=ROOT, only=None, check=False):
    "Stamp every page, or only some; returns those that were (or, with check, are) out of step"
    root = Path(root)
    cfg, changed = settings(root), []
    for page in only or pages(root):
        path = root / "nbs" / page
        nb = stamped(path, cfg, page)
        if nb != read_notebook(path):
            changed.append(page.as_posix())
            if not check:
                write_notebook(nb, path)
    return changed


def main():
    parser = argparse.ArgumentParser(description="Stamp badges and the Colab install cell into the notebooks")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of step")
    parser.add_argument("notebooks", nargs="*", help="notebooks below nbs/; all of them if none is named")
    args = parser.parse_args()
    try:
        only = [Path(f).resolve().relative_to(ROOT / "nbs") for f in args.notebooks]
        changed = stamp(only=only, check=args.check)
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    for page in changed:
        print(f"nbs/{page}: " + ("not stamped as settings.ini says; run make prepare" if args.check else "stamped"))
    sys.exit(1 if args.check and changed else 0)


if __name__ == "__main__":
    main()
