"""Are the chapters clean, and is the package what they export?

Runs nbdev_clean and nbdev_export and compares the files before and after, so that it tells the same in a dirty
working tree as in a fresh clone. What it finds it has already put right: look at the change and commit it.
"""
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from book import ROOT, directives, pages, read_notebook

TOP = ("settings.ini", "setup.py", "pyproject.toml", "README.md", "_quarto.yml")


def snapshot(root):
    "Hash of every file that cleaning and exporting could touch"
    root = Path(root)
    files = [root / "nbs" / p for p in pages(root)] + sorted((root / "flash_transformer").rglob("*.py"))
    files += [root / f for f in TOP] + [root / "nbs/sidebar.yml"]
    return {f.relative_to(root).as_posix(): sha256(f.read_bytes()).hexdigest() for f in files if f.exists()}


def differences(before, after):
    return sorted(f for f in before.keys() | after.keys() if before.get(f) != after.get(f))


def exported_modules(root):
    "Files of the package that some chapter exports to"
    names = set()
    for page in pages(root):
        for cell in read_notebook(Path(root) / "nbs" / page)["cells"]:
            if cell["cell_type"] == "code":
                for words in map(str.split, directives(cell["source"])):
                    if len(words) == 2 and words[0] in ("default_exp", "export", "exports", "exporti"):
                        names.add("flash_transformer/" + words[1].replace(".", "/") + ".py")
    return names


def strangers(root):
    "Modules that no chapter exports: left over, or written by hand"
    package = Path(root) / "flash_transformer"
    found = {p.relative_to(root).as_posix() for p in package.rglob("*.py") if p.stem not in ("__init__", "_modidx")}
    return sorted(found - exported_modules(root))


def run(tool, root):
    "An nbdev command of this very environment"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under IN_TEST nbdev_export does nothing
    subprocess.run([Path(sys.executable).with_name(tool)], cwd=root, env=env, check=True)


def check(root=ROOT):
    "What is out of step, as sentences"
    before = snapshot(root)
    problems = [f"{m}: no chapter exports it" for m in strangers(root)]
    run("nbdev_clean", root)
    cleaned = snapshot(root)
    problems += [f"{f}: was not clean (nbdev_clean changed it)" for f in differences(before, cleaned)]
    run("nbdev_export", root)
    problems += [f"{f}: was not what the chapters export (nbdev_export changed it)"
                 for f in differences(cleaned, snapshot(root))]
    return problems


def main():
    try:
        problems = check()
    except (ValueError, subprocess.CalledProcessError) as e:
        sys.exit(str(e))
    print(*problems, sep="\n", end="\n" if problems else "")
    if problems:
        sys.exit("Out of step: look at what changed and commit it (make prepare does the same).")


if __name__ == "__main__":
    main()
