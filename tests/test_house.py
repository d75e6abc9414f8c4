"The tools that keep the house in order: each check passes on a whole little book and fails on a broken one."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import book
import check_docs
import in_step
import readme
import stamp

ROOT = Path(__file__).resolve().parent.parent


def cell(kind, source, **more):
    code = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": f"c{abs(hash(source)) % 10**8}", "metadata": {}, "source": source, **code, **more}


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    book.write_notebook({"cells": list(cells), "metadata": meta, "nbformat": 4, "nbformat_minor": 5}, path)


def append(path, *cells):
    nb = book.read_notebook(path)
    book.write_notebook({**nb, "cells": nb["cells"] + list(cells)}, path)


SIDEBAR = """website:
  sidebar:
    contents:
      - index.ipynb
      - section: "1"
        contents: [1_a/01_first.ipynb, 1_a/02_second.ipynb]
      - section: Reference
        contents:
          - file: config.ipynb
"""


@pytest.fixture
def house(tmp_path):
    "A book of three chapters that has everything right"
    for name in ("settings.ini", "_quarto.yml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    nbs, cfg = tmp_path / "nbs", book.settings()
    write(nbs / "index.ipynb", cell("markdown", "# The book\n\n> What it is."),
          cell("markdown", "Read [the first](1_a/01_first.ipynb). ![plot](images/plot.png)"),
          cell("code", "#| eval: false\nprint('no [link](missing.ipynb)')"))
    write(nbs / "1_a/01_first.ipynb", cell("markdown", "# First\n\n> You can count."), cell("code", "1 + 1"),
          cell("markdown", "## Why $\\sqrt{d}$?\n\nSee [below](#why-sqrtd) and [there](02_second.ipynb#one-pass).\n\n"
               "<img src=\"../images/plot.png\">\n\n"
               "```\n[no link](nowhere.ipynb)\n```\n\nand `[none](x.ipynb)`, $a[i](b)$"))
    write(nbs / "1_a/02_second.ipynb", cell("markdown", "# Second\n\n> You can add."),
          cell("markdown", "## 1. One pass\n\n[home](../index.ipynb), [recipes](../config.ipynb#recipe)"))
    write(nbs / "config.ipynb", cell("markdown", "# Config\n\n> You can set."),
          cell("code", "#| export\nclass Recipe:\n    pass"))
    (nbs / "images").mkdir()
    (nbs / "images/plot.png").write_bytes(b"\x89PNG")
    (nbs / "styles.css").write_text("a {}")
    (nbs / "sidebar.yml").write_text(SIDEBAR)
    (nbs / "nbdev.yml").write_text(f"website:\n  repo-url: \"{cfg['git_url']}\"\n")
    (nbs / "_quarto.yml").symlink_to("../_quarto.yml")
    (tmp_path / "CONTRIBUTING.md").write_text("# How\n\n## 1. Set up: now\n\n"
                                              "[up](#1-set-up-now) [home](nbs/index.ipynb)\n"
                                              f"[code]({cfg['git_url']}/blob/{cfg['branch']}/settings.ini)\n")
    return tmp_path


def problems(house):
    return [*check_docs.check_frame(house), *check_docs.check_sidebar(house), *check_docs.check_pages(house),
            *check_docs.check_links(house)[0]]


def test_whole_book_passes(house):
    assert problems(house) == []
    stamp.stamp(house)
    (house / "README.md").write_text(readme.readme(house))
    assert problems(house) == []
    # seven in the pages, three in CONTRIBUTING.md; stamped: three Colab badges, the licence; three in README.md
    assert check_docs.check_links(house)[1] == 17


FIRST, SECOND = "nbs/1_a/01_first.ipynb", "nbs/1_a/02_second.ipynb"
MARKDOWN = [
    ("[x](02_secund.ipynb)", "leads nowhere"),
    ("[x](02_second.ipynb#two-passes)", "no heading there has the id two-passes"),
    ("[x](#first)", "no heading there has the id first"),  # the title has no id on the site
    ("[x](../../settings.ini)", "leads out of the site"),
    ("[x](../images)", "leads to a folder"),
    ("[x][ref]\n\n[ref]: 03_third.ipynb", "leads nowhere"),
    ("![x](../images/missing.png)", "leads nowhere"),
    ("![x](attachment:missing.png)", "is not attached"),
    ("<a href='../nothing.ipynb'>x</a>", "leads nowhere"),
    ("<details>\n<summary>s</summary>\n\n[x](gone.ipynb)\n\n</details>", "leads nowhere"),
    ("| a |\n|---|\n| [x](gone.ipynb) |", "leads nowhere"),
    ("- item **[x](gone%20away.ipynb)**", "leads nowhere"),
    ("# Another title", "more than one heading of the first level"),
]


@pytest.mark.parametrize("source, said", MARKDOWN)
def test_broken_markdown_is_found(house, source, said):
    append(house / FIRST, cell("markdown", source))
    found = problems(house)
    assert len(found) == 1 and said in found[0] and found[0].startswith(FIRST)


def test_address_of_ours_must_exist(house):
    cfg = book.settings()
    link = f"{cfg['git_url']}/blob/{cfg['branch']}/nothing.py"
    append(house / FIRST, cell("markdown", f"[x]({link})"))
    assert problems(house) == [f"{FIRST}: {link} leads nowhere"]


def test_anchor_of_markdown_follows_github(house):
    (house / "CONTRIBUTING.md").write_text("## 1. Set up\n\n[right](#1-set-up) [the site's way](#set-up)\n")
    assert problems(house) == ["CONTRIBUTING.md: #set-up: no heading there has the id set-up"]


def test_repeated_headings_are_numbered(house):
    append(house / FIRST, cell("markdown", "## Again\n\n## Again\n\n[x](#again) [y](#again-1)"))
    assert problems(house) == []
    append(house / FIRST, cell("markdown", "[z](#again-2)"))
    assert len(problems(house)) == 1


@pytest.mark.parametrize("text, slug", [  # as pandoc 2.17 gives them
    ("Why \\sqrt{d}?", "why-sqrtd"), ("1. One pass is enough", "one-pass-is-enough"), ("42", "section"),
    ("What's new -- and what isn't", "whats-new-and-what-isnt"),
    ("Über die Brücke: ein Weg", "über-die-brücke-ein-weg"),
    ("A (very) long/short title, v2.9", "a-very-longshort-title-v2.9"), ("TokenizerPair.train", "tokenizerpair.train"),
    ("Scores — BLEU & chrF", "scores-bleu-chrf"), ("x_1 − x_2", "x_1-x_2")])
def test_quarto_slug(text, slug):
    assert check_docs.quarto_slug(text) == slug


BROKEN = {
    "yaml": ("nbs/sidebar.yml", lambda s: s + "  - [", "nbs/sidebar.yml"),
    "missing": ("nbs/sidebar.yml", lambda s: s.replace("1_a/01_first.ipynb, ", ""), "1_a/01_first.ipynb is missing"),
    "stranger": ("nbs/sidebar.yml", lambda s: s + "          - gone.ipynb\n", "gone.ipynb does not exist"),
    "twice": ("nbs/sidebar.yml", lambda s: s + "          - index.ipynb\n", "index.ipynb is there 2 times"),
    "order": ("nbs/sidebar.yml", lambda s: s.replace("[1_a/01_first.ipynb, 1_a/02_second.ipynb]",
                                                     "[1_a/02_second.ipynb, 1_a/01_first.ipynb]"),
              "not in reading order"),
    "metadata": ("_quarto.yml", lambda s: s.replace("nbdev.yml, sidebar.yml]", "nbdev.yml]"),
                 "does not name sidebar.yml"),
    "css": ("_quarto.yml", lambda s: s.replace("styles.css", "stiles.css"), "css names stiles.css"),
    "address": ("nbs/nbdev.yml", lambda s: s.replace("https://", "https://elsewhere."), "repo-url is"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_frame_is_found(house, what):
    file, change, said = BROKEN[what]
    text = (house / file).read_text()
    assert change(text) != text
    (house / file).write_text(change(text))
    found = check_docs.check_frame(house) or check_docs.check_sidebar(house)
    assert len(found) == 1 and said in found[0]


def test_quarto_yml_must_be_a_link(house):
    (house / "nbs/_quarto.yml").unlink()
    shutil.copy(house / "_quarto.yml", house / "nbs/_quarto.yml")
    assert problems(house) == ["nbs/_quarto.yml: must be a link to ../_quarto.yml"]


def test_broken_pages_are_found(house):
    error = {"output_type": "error", "ename": "E", "evalue": "", "traceback": []}
    write(house / "nbs/1_a/03_third.ipynb", cell("markdown", "# Third\n\nNo quotation."),
          cell("code", "1/0", outputs=[error]))
    write(house / "nbs/1_a/04_third.ipynb", cell("markdown", "# Fourth\n\n> Fine."),
          cell("markdown", "x" * check_docs.MAX_BYTES))
    found = check_docs.check_pages(house)
    assert [f.split(": ")[0][-14:] for f in found] == ["03_third.ipynb"] * 2 + ["04_third.ipynb"] * 2
    for said, f in zip(["> one sentence", "error among its outputs", "are the most", "same address"], found):
        assert said in f


@pytest.mark.parametrize("source, found", [
    ("import os\nos.getcwd()", True), ("def f():\n    import os\n    return os.getcwd()\nx = f()", True),
    ("import os\nfrom json import dumps", False), ("#| export\nimport os\nx = 1", False),
    ("#| eval: false\nimport os\nx = 1", False), ("%matplotlib inline\nimport os\nx = 1", False), ("x = 1", False)])
def test_imports_stand_alone(house, source, found):
    append(house / FIRST, cell("code", source))
    assert [FIRST in p and "imports and does other" in p for p in problems(house)] == [True] * found


def test_reading_order_counts_as_people_do():
    names = ["index.ipynb", "2_b/9_y.ipynb", "2_b/10_x.ipynb", "10_z/01_a.ipynb", "cli.ipynb"]
    assert sorted(reversed(names), key=book.reading_order) == sorted(sorted(names), key=book.reading_order) == names


# -- stamps and README -------------------------------------------------------------------------------------------

def test_stamp_is_idempotent_and_keeps_the_rest(house):
    path = house / FIRST
    before = book.read_notebook(path)["cells"]
    pages = ["index.ipynb", "1_a/01_first.ipynb", "1_a/02_second.ipynb", "config.ipynb"]
    assert stamp.stamp(house, check=True) == pages
    assert book.read_notebook(path)["cells"] == before  # --check changes nothing
    assert len(stamp.stamp(house)) == 4
    once = path.read_bytes()
    assert stamp.stamp(house) == stamp.stamp(house, check=True) == [] and path.read_bytes() == once
    title, badge, install, *rest = book.read_notebook(path)["cells"]
    assert [title, *rest] == before
    cfg = book.settings()
    assert f"/github/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/{FIRST})" in badge["source"]
    assert book.directives(install["source"]) == ["hide", "eval: false"] and cfg["git_url"] in install["source"]


def test_stamp_follows_settings(house):
    stamp.stamp(house)
    ini = house / "settings.ini"
    ini.write_text(ini.read_text().replace("user = flash-transformer", "user = someone-else"))
    assert len(stamp.stamp(house, check=True)) == 4
    stamp.stamp(house)
    assert stamp.stamp(house, check=True) == []
    assert "someone-else" in (house / FIRST).read_text() and "flash-transformer" not in (house / FIRST).read_text()


def test_stamp_makes_the_sentence_a_description(house):
    write(house / FIRST, cell("markdown", "# First\nYou can\ncount.\n\nMore."), cell("code", "1"))
    stamp.stamp(house)
    cells = book.read_notebook(house / FIRST)["cells"]
    assert [c["source"] for c in cells if c["id"] not in stamp.STAMPED] == ["# First\n\n> You can count.", "More.", "1"]


@pytest.mark.parametrize("cells", [[], [cell("code", "1")], [cell("markdown", "No title")]])
def test_stamp_refuses_a_page_without_title(house, cells):
    write(house / FIRST, *cells)
    with pytest.raises(ValueError, match="01_first"):
        stamp.stamp(house)


def test_not_a_notebook(house):
    (house / FIRST).write_text("{}")
    with pytest.raises(ValueError, match="01_first.ipynb is not a notebook"):
        stamp.stamp(house)


def test_install_cell_does_nothing_outside_colab(house):
    stamp.stamp(house)
    nb = book.read_notebook(house / FIRST)
    source = next(c["source"] for c in nb["cells"] if c["id"] == "colab-install")
    IPython = pytest.importorskip("IPython")
    ran = []
    shell = IPython.core.interactiveshell.InteractiveShell.instance()
    shell.run_line_magic = lambda name, line, **kw: ran.append((name, line))
    try:
        assert shell.run_cell(source).success and ran == []
        sys.modules["google.colab"] = sys
        assert shell.run_cell(source).success and [r[0] for r in ran] == ["pip"]
        assert book.settings()["git_url"] in ran[0][1]
    finally:
        sys.modules.pop("google.colab", None)
        del shell.run_line_magic


def test_readme_from_the_home_page(house):
    stamp.stamp(house)
    append(house / "nbs/index.ipynb", cell("code", "#| hide\nsecret = 1"),
           cell("markdown", "<img src=\"images/plot.png\"> [out](https://example.org) [here](#x)"))
    text = readme.readme(house)
    assert "[the first](nbs/1_a/01_first.ipynb)" in text and "![plot](nbs/images/plot.png)" in text
    assert 'src="nbs/images/plot.png"' in text and "(https://example.org)" in text and "(#x)" in text
    assert "```python\nprint('no [link](missing.ipynb)')" in text and "secret" not in text and "eval: false" not in text


def test_readme_refuses_pictures_among_outputs(house):
    png = {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}, "metadata": {}}
    append(house / "nbs/index.ipynb", cell("code", "plot()", outputs=[png]))
    with pytest.raises(ValueError, match="nbs/images"):
        readme.readme(house)


# -- nbdev itself ------------------------------------------------------------------------------------------------

@pytest.fixture
def exported(house):
    "The little book with its package, exported and clean"
    write(house / "nbs/config.ipynb", cell("markdown", "# Config\n\n> You can set."),
          cell("code", "#| default_exp config"), cell("code", "#| export\nclass Recipe:\n    'All of it'"))
    (house / "flash_transformer").mkdir()
    (house / "flash_transformer/__init__.py").write_text("__version__ = \"0.1.0\"\n")
    in_step.run("nbdev_export", house)
    in_step.run("nbdev_clean", house)
    return house


def test_in_step(exported):
    assert in_step.check(exported) == []
    module = exported / "flash_transformer/config.py"
    text = module.read_text()
    module.write_text(text.replace("All of it", "By hand"))
    assert [p.split(":")[0] for p in in_step.check(exported)] == ["flash_transformer/config.py"]
    assert module.read_text() == text  # put right
    (exported / "flash_transformer/stray.py").write_text("x = 1\n")
    assert in_step.check(exported)[0] == "flash_transformer/stray.py: no chapter exports it"
    (exported / "flash_transformer/stray.py").unlink()
    in_step.run("nbdev_export", exported)
    nb = json.loads((exported / FIRST).read_text())
    nb["cells"][1]["execution_count"] = 7
    (exported / FIRST).write_text(json.dumps(nb))
    assert in_step.check(exported) == [f"{FIRST}: was not clean (nbdev_clean changed it)"]


def test_process_without_quarto(exported, monkeypatch):
    "nbdev_proc_nbs does its work and installs nothing"
    trap = exported / "trap"
    trap.mkdir()
    for name in ("sudo", "curl", "dpkg", "pip"):
        (trap / name).write_text(f"#!/bin/sh\ntouch {exported}/called-{name}\nexit 1\n")
        (trap / name).chmod(0o755)
    bin = Path(sys.executable).parent
    monkeypatch.setenv("PATH", os.pathsep.join([str(trap), str(bin), "/usr/bin", "/bin"]))
    if shutil.which("quarto"):
        pytest.skip("Quarto is installed among the system's own commands: nothing to stand in for")
    assert check_docs.process(exported) == []
    assert not list(exported.glob("called-*"))
    assert problems(exported) == []
    page = json.loads((exported / "_proc/config.ipynb").read_text())
    text = "".join("".join(c["source"]) for c in page["cells"])
    assert "title: Config" in text and "class Recipe" in text  # a book shows its code
    append(exported / FIRST, cell("code", "y = 1"), cell("code", "#| export\nx = y"))
    assert "nbdev_proc_nbs failed" in check_docs.process(exported)[0]


def test_tools_tell_by_their_exit_status(exported):
    "As make calls them"
    for name in ("book", "stamp", "readme", "check_docs", "in_step"):
        (exported / "tools").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tools" / f"{name}.py", exported / "tools")

    def run(*args):
        return subprocess.run([sys.executable, *args], cwd=exported, capture_output=True, text=True)

    assert run("tools/stamp.py", "--check").returncode == 1
    assert run("tools/stamp.py").returncode == run("tools/stamp.py", "--check").returncode == 0
    done = run("tools/readme.py", "--check")
    assert done.returncode == 1 and "make prepare" in done.stderr
    assert run("tools/readme.py").returncode == run("tools/readme.py", "--check").returncode == 0
    (exported / "flash_transformer/stray.py").write_text("x = 1\n")
    done = run("tools/in_step.py")
    assert done.returncode == 1 and "stray.py: no chapter exports it" in done.stdout
    append(exported / FIRST, cell("markdown", "[x](gone.ipynb)"))
    done = run("tools/check_docs.py")
    assert done.returncode == 1 and f"{FIRST}: gone.ipynb leads nowhere" in done.stdout
