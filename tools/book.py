"What the tools share: where the chapters are, in which order they are read, how they are read and written."
import json
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def settings(root=ROOT):
    "settings.ini as a mapping: the one place where the repository's address stands"
    cfg = ConfigParser(delimiters=["="])
    if not cfg.read(Path(root) / "settings.ini", encoding="utf-8"):
        raise FileNotFoundError(f"{root} has no settings.ini")
    return cfg["DEFAULT"]


def reading_order(path):  # relative to nbs/
    "Sort key: the home page, then folders and files by their numbers, then what has no number"
    first, *rest = Path(path).parts
    if not rest:
        return (0 if first == "index.ipynb" else 2,)
    return (1, _number(first), first, *((_number(p), p) for p in rest))


def _number(name):
    m = re.match(r"\d+", name)
    return int(m.group()) if m else 10**6


def pages(root=ROOT):
    "Every notebook of the site, relative to nbs/, in reading order"
    nbs = Path(root) / "nbs"
    found = (p.relative_to(nbs) for p in nbs.rglob("*.ipynb"))
    return sorted((p for p in found if not any(part[0] in "._" for part in p.parts)),
                  key=lambda p: (reading_order(p), p.as_posix()))


def read_notebook(path):
    try:
        nb = json.loads(Path(path).read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            cell["source"] = "".join(cell["source"])
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is not a notebook: {e}") from e
    return nb


def write_notebook(nb, path):
    "Write as nbdev_clean does, so that it finds nothing to change"
    nb = {**nb, "cells": [{**c, "source": c["source"].splitlines(keepends=True)} for c in nb["cells"]]}
    Path(path).write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def directives(source):
    "The `#|` lines a code cell opens with, without the mark"
    out = []
    for line in source.splitlines():
        if not line.strip():
            continue
        m = re.match(r"\s*#\s*\|\s*(.*)", line)
        if not m:
            break
        out.append(m.group(1).strip())
    return out
