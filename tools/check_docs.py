"""Would the site come out whole? Needs no Quarto.

Runs nbdev_proc_nbs, which makes of the chapters in nbs/ the pages in _proc/ that Quarto renders, and checks that
  - _quarto.yml, nbdev.yml and sidebar.yml parse and belong together,
  - every page is in the sidebar once, in reading order, and nothing else is,
  - every page has its title, no output that is an error, an address of its own, a size that loads, and imports in cells
    of their own,
  - every internal link, anchor and picture of the pages, README.md and CONTRIBUTING.md leads somewhere.
"""
import ast
import html
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import mistune
import yaml

from book import ROOT, directives, pages, read_notebook, settings

MARKDOWN = ("README.md", "CONTRIBUTING.md")
MAX_BYTES = 1_500_000  # of a notebook with its pictures


# -- the pages as nbdev hands them to Quarto ---------------------------------------------------------------------

def process(root=ROOT, workers=2):
    """Run nbdev_proc_nbs. It goes to download and install Quarto when there is none on the PATH, though it does not
    use it: for this command alone a `quarto` that does nothing stands in."""
    root = Path(root)
    shutil.rmtree(root / "_proc", ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.environ.get("PATH", "")
        if not shutil.which("quarto"):
            stand_in = Path(folder) / "quarto"
            stand_in.write_text("#!/bin/sh\nexit 0\n")
            stand_in.chmod(0o755)
            path = f"{path}{os.pathsep}{folder}"
        env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"PATH": path}
        tool = Path(sys.executable).with_name("nbdev_proc_nbs")
        done = subprocess.run([tool, "--n_workers", str(workers)], cwd=root, env=env, capture_output=True, text=True)
    if done.returncode:
        return [f"nbdev_proc_nbs failed:\n{(done.stdout + done.stderr)[-4000:]}"]
    expected = [p.as_posix() for p in pages(root)] + ["_quarto.yml", "nbdev.yml", "sidebar.yml"]
    return [f"nbdev_proc_nbs left no _proc/{p}" for p in expected if not (root / "_proc" / p).is_file()]


# -- the site's frame --------------------------------------------------------------------------------------------

def check_frame(root=ROOT):
    "_quarto.yml and what it names parse and belong together"
    root, problems, loaded = Path(root), [], {}
    for name in ("_quarto.yml", "nbs/_quarto.yml", "nbs/nbdev.yml", "nbs/sidebar.yml"):
        try:
            loaded[name] = yaml.safe_load((root / name).read_text(encoding="utf-8"))
            if not isinstance(loaded[name], dict):
                problems.append(f"{name}: holds no mapping")
        except (OSError, yaml.YAMLError) as e:
            problems.append(f"{name}: {e}")
    if problems:
        return problems
    if (root / "nbs/_quarto.yml").resolve() != (root / "_quarto.yml").resolve():
        problems.append("nbs/_quarto.yml: must be a link to ../_quarto.yml")
    named = loaded["_quarto.yml"].get("metadata-files", [])
    problems += [f"_quarto.yml: metadata-files does not name {f}" for f in ("nbdev.yml", "sidebar.yml")
                 if f not in named]
    problems += [f"_quarto.yml: metadata-files names {f}, which nbs/ has not" for f in named
                 if not (root / "nbs" / f).is_file()]
    css = ((loaded["_quarto.yml"].get("format") or {}).get("html") or {}).get("css")
    if css and not (root / "nbs" / css).is_file():
        problems.append(f"_quarto.yml: css names {css}, which nbs/ has not")
    cfg, site = settings(root), loaded["nbs/nbdev.yml"].get("website") or {}
    if site.get("repo-url") != cfg["git_url"]:
        problems.append(f"nbs/nbdev.yml: repo-url is {site.get('repo-url')}, settings.ini says {cfg['git_url']}")
    return problems


def sidebar_entries(contents):
    "The pages a sidebar names, in order"
    for item in contents or []:
        if isinstance(item, str):
            yield item
        else:
            yield from (item[k] for k in ("href", "file") if k in item)
            if str(item.get("section", "")).endswith(".ipynb"):
                yield item["section"]
            yield from sidebar_entries(item.get("contents"))


def check_sidebar(root=ROOT):
    "Every page once, in reading order, and nothing else"
    root = Path(root)
    sidebar = yaml.safe_load((root / "nbs/sidebar.yml").read_text(encoding="utf-8"))
    listed = list(sidebar_entries(sidebar["website"]["sidebar"]["contents"]))
    there = [p.as_posix() for p in pages(root)]
    problems = [f"nbs/sidebar.yml: {p} is missing" for p in there if p not in listed]
    problems += [f"nbs/sidebar.yml: {p} does not exist" for p in dict.fromkeys(listed) if p not in there]
    problems += [f"nbs/sidebar.yml: {p} is there {n} times" for p, n in Counter(listed).items() if n > 1]
    # pages without a number may stand in any order, after those with one
    numbered = [p for p in there if p == "index.ipynb" or "/" in p]
    got = [p for p in dict.fromkeys(listed) if p in there]
    want = numbered + [p for p in got if p not in numbered]
    want = [p for p in want if p in got]
    if got != want:
        at = next(i for i, (a, b) in enumerate(zip(got, want)) if a != b)
        problems.append(f"nbs/sidebar.yml: not in reading order: {got[at]} stands where {want[at]} belongs")
    return problems


def imports_and_more(cell):
    """Does this cell import and do something else? For its tables of arguments nbdev runs the cells that export or
    import, and no others: what such a cell needs of an earlier one is not there, and it may take long."""
    marks = directives(cell["source"])
    if cell["cell_type"] != "code" or any(re.match(r"export|exec_doc|eval: *false", m) for m in marks):
        return False
    try:
        nodes = list(ast.walk(ast.parse(cell["source"])))
    except SyntaxError:  # magics: nbdev does not run those either
        return False
    return (any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in nodes)
            and any(isinstance(n, (ast.Expr, ast.Assign)) for n in nodes))


def check_pages(root=ROOT):
    "Title, outputs, imports, address and size of each page"
    nbs, problems, addresses = Path(root) / "nbs", [], {}
    for page in pages(root):
        name, path = f"nbs/{page.as_posix()}", nbs / page
        cells = read_notebook(path)["cells"]
        first = cells[0]["source"].strip() if cells and cells[0]["cell_type"] == "markdown" else ""
        if not re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*", first):
            problems.append(f"{name}: the first cell must be `# Title`, an empty line and `> one sentence`")
        if sum(h.level == 1 for h in document(path).headings) > 1:
            problems.append(f"{name}: has more than one heading of the first level")
        if any(o["output_type"] == "error" for c in cells for o in c.get("outputs", [])):
            problems.append(f"{name}: was committed with an error among its outputs")
        problems += [f"{name}: the cell that begins {c['source'].strip().splitlines()[0]!r} imports and does other "
                     "things; the imports belong in a cell of their own" for c in cells if imports_and_more(c)]
        if path.stat().st_size > MAX_BYTES:
            problems.append(f"{name}: {path.stat().st_size:,} bytes; {MAX_BYTES:,} are the most")
        # nbdev takes the number off a page's name for its address
        address = page.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", page.name.lower())).as_posix()
        if address in addresses:
            problems.append(f"{name}: gets the same address on the site as nbs/{addresses[address].as_posix()}")
        addresses[address] = page
    return problems


# -- links -------------------------------------------------------------------------------------------------------

class Heading(NamedTuple):
    level: int
    text: str


class Document:
    "What links need to know of a file: what it links to, and the places in it that can be linked to"
    def __init__(self, page=False):
        self.page, self.links, self.headings, self.ids, self.attachments = page, [], [], set(), set()

    def add_markdown(self, text):
        for token in _parse(text):
            self._walk(token)

    def _walk(self, token):
        kind, attrs = token["type"], token.get("attrs", {})
        if kind in ("link", "image"):
            self.links.append(attrs["url"])
        elif kind == "heading":
            text = _plain(token)
            m = re.search(r"\s*\{[^}]*#([\w.:-]+)[^}]*\}\s*$", text)  # {#explicit-id}
            if m:
                self.ids.add(m.group(1))
            else:
                self.headings.append(Heading(attrs["level"], text))
        elif kind in ("block_html", "inline_html"):
            raw = token.get("raw", "")
            self.links += [html.unescape(u) for u in re.findall(r"<[^>]*\b(?:href|src)\s*=\s*[\"']([^\"']+)", raw)]
            self.ids |= set(re.findall(r"<[^>]*\b(?:id|name)\s*=\s*[\"']([^\"']+)", raw))
        for child in token.get("children") or []:
            self._walk(child)

    def anchors(self, slug):
        "Ids of the headings, numbered where they repeat, and the explicit ones"
        seen, out = Counter(), set(self.ids)
        for h in self.headings:
            if self.page and h.level == 1:
                continue  # a page's title has no id on the site
            s = slug(h.text)
            out.add(f"{s}-{seen[s]}" if seen[s] else s)
            seen[s] += 1
        return out


_parse = mistune.create_markdown(renderer=None, plugins=["table", "strikethrough", "footnotes", "math"])


def _plain(token):
    if "children" in token:
        return "".join(map(_plain, token["children"]))
    return " " if token["type"] in ("softbreak", "linebreak") else token.get("raw", "")


def quarto_slug(text):
    "A heading's id on the site: pandoc's auto_identifiers"
    text = re.sub(r"--+|\.\.\.", "", text)  # pandoc makes dashes and an ellipsis of them, and drops those
    kept = "".join(c for c in text if c.isalnum() or c in "_-." or c.isspace())
    start = next((i for i, c in enumerate(kept) if c.isalpha()), None)
    return "section" if start is None else "-".join(kept[start:].lower().split())


def github_slug(text):
    "A heading's id on GitHub"
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def document(path):
    "Read a notebook or a markdown file"
    doc = Document(page=path.suffix == ".ipynb")
    if path.suffix != ".ipynb":
        doc.add_markdown(path.read_text(encoding="utf-8"))
        return doc
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] == "markdown":
            doc.add_markdown(cell["source"])
            doc.attachments |= set(cell.get("attachments", {}))
        elif cell["cell_type"] == "code":
            marks = directives(cell["source"])
            if any(m.split()[:1] in (["export"], ["exports"]) for m in marks) and "hide" not in marks:
                # nbdev puts a heading with the name before each table of arguments
                names = re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", cell["source"], re.MULTILINE)
                doc.ids |= {n.lower() for n in names}
            doc.ids |= {m.lower() for m in re.findall(r"^show_doc\(([\w.]+)", cell["source"], re.MULTILINE)}
    return doc


def check_links(root=ROOT):
    "Every internal link leads somewhere; returns the problems and how many links there were"
    root = Path(root).resolve()
    cfg = settings(root)
    here = {f"{cfg['git_url']}/{kind}/{cfg['branch']}/" for kind in ("blob", "tree", "raw")}
    here.add(f"https://colab.research.google.com/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/")
    files = [root / "nbs" / p for p in pages(root)] + [root / f for f in MARKDOWN if (root / f).exists()]
    docs = {f: document(f) for f in files}
    problems, count = [], 0
    for file, doc in docs.items():
        name = file.relative_to(root).as_posix()
        for link in doc.links:
            ours = next((h for h in here if link.startswith(h)), None)
            if ours:
                target, anchor = root / unquote(urlsplit(link[len(ours):]).path), ""
            elif re.match(r"(https?|mailto|data):", link):
                continue
            elif link.startswith("attachment:"):
                count += 1
                if unquote(link.removeprefix("attachment:")) not in doc.attachments:
                    problems.append(f"{name}: {link} is not attached")
                continue
            else:
                parts = urlsplit(link)
                target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
                anchor = unquote(parts.fragment)
                if file.suffix == ".ipynb" and not target.is_relative_to(root / "nbs"):
                    problems.append(f"{name}: {link} leads out of the site; name the file in code type instead")
                    continue
            count += 1
            if not target.exists():
                problems.append(f"{name}: {link} leads nowhere")
            elif target.is_file() and not target.stat().st_size:
                problems.append(f"{name}: {link} leads to an empty file")
            elif target.is_dir() and file.suffix == ".ipynb":
                problems.append(f"{name}: {link} leads to a folder")
            elif anchor and target.suffix in (".ipynb", ".md"):
                there = docs.get(target) or document(target)
                slug = quarto_slug if target.suffix == ".ipynb" else github_slug
                if anchor not in there.anchors(slug):
                    problems.append(f"{name}: {link}: no heading there has the id {anchor}")
    return problems, count


def main():
    try:
        problems = process() + check_frame() + check_sidebar() + check_pages()
        bad_links, count = check_links()
    except ValueError as e:
        sys.exit(str(e))
    problems += bad_links
    if problems:
        print(*problems, sep="\n")
        sys.exit(f"{len(problems)} problems in the docs")
    print(f"{len(pages())} pages processed and in the sidebar; {count} internal links and pictures lead somewhere")


if __name__ == "__main__":
    main()
