"""The animation of tiled attention: its record is true, its page stands alone, and what cannot be drawn is refused."""
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_transformer.attention import AttentionMask
from flash_transformer.attention.tile_walk import naive_trace, tile_strip, tile_walk, tiled_trace, walk_trace


def qkv(q_len=12, k_len=12, head_dim=4, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(2 * torch.randn(n, head_dim, dtype=dtype, generator=rng) for n in (q_len, k_len, k_len))


def bounds(length, size): return [(a, min(a + size, length)) for a in range(0, length, size)]


LENGTHS, BLOCKS = st.integers(1, 12), st.integers(1, 6)


# ---- the record ----

@given(q_len=LENGTHS, k_len=LENGTHS, head_dim=st.integers(1, 5), causal=st.booleans(), block_q=BLOCKS, block_k=BLOCKS,
       dtype=st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=60, deadline=None)
def test_the_record_is_true(q_len, k_len, head_dim, causal, block_q, block_k, dtype):
    q, k, v = qkv(q_len, k_len, head_dim, dtype)
    tiled, naive = (trace(q, k, v, causal, block_q, block_k) for trace in (tiled_trace, naive_trace))
    see = AttentionMask(causal=causal).dense(q_len, k_len)[0, 0].expand(q_len, k_len)
    exact = [x.double()[None, None] for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*exact, attn_mask=see)[0, 0].nan_to_num(0)
    close = dict(rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    rows_written = [row for f in tiled if f["phase"] == "write" for row in f["fast"]["O"]]
    torch.testing.assert_close(torch.tensor(rows_written, dtype=torch.float64), expected, **close)
    torch.testing.assert_close(torch.tensor(naive[-1]["O"], dtype=torch.float64), expected, **close)

    # tiles: those with a key to see are visited in order, the others skipped
    tiles = [(r, c) for r in bounds(q_len, block_q) for c in bounds(k_len, block_k)]
    seen = {(r, c): bool(see[slice(*r), slice(*c)].any()) for r, c in tiles}
    for phase in ("load K V", "scores", "fold"):
        visited = [(tuple(f["rows"]), tuple(f["keys"])) for f in tiled if f["phase"] == phase]
        assert visited == [t for t in tiles if seen[t]]
    skipped = [(tuple(f["rows"]), tuple(keys)) for f in tiled for keys in f.get("skipped", [])]
    assert skipped == [t for t in tiles if not seen[t]]

    # bytes: each number that has to cross, counted from the tiles alone
    size, d = q.element_size(), head_dim
    loads = sum(2 * (c[1] - c[0]) * d for t in tiles if seen[t] for c in t[1:])
    assert tiled[-1]["read"] == size * (q_len * d + loads)
    assert tiled[-1]["written"] == size * (q_len * d + q_len)
    assert naive[-1]["read"] == size * (q_len * d + len(bounds(q_len, block_q)) * 2 * k_len * d + 2 * q_len * k_len)
    assert naive[-1]["written"] == size * (2 * q_len * k_len + q_len * d)
    for trace in (tiled, naive):
        for way in ("read", "written"): assert all(a[way] <= b[way] for a, b in zip(trace, trace[1:]))


def test_maximum_and_sum_are_those_of_the_keys_so_far():
    q, k, v = qkv()
    scores = (q @ k.T / 2).masked_fill(~AttentionMask(causal=True).dense(12, 12)[0, 0], -torch.inf)
    for f in tiled_trace(q, k, v, True, 4, 3):
        if f["phase"] != "fold": continue
        part = scores[slice(*f["rows"]), :f["keys"][1]]
        m = part.amax(1)
        weights = torch.exp(part - m[:, None])
        for got, expected in ((f["fast"]["m"], m), (f["fast"]["l"], weights.sum(1)),
                              (f["fast"]["O"], weights @ v[:f["keys"][1]]), (f["fast"]["P"], weights[:, f["keys"][0]:]),
                              (f["factor"], torch.exp(torch.tensor(f["before"]["m"], dtype=torch.float64) - m))):
            torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), expected)


def test_fast_memory_never_holds_more_than_a_tile_of_each():
    for f in tiled_trace(*qkv(), block_q=3, block_k=4):
        fast = f["fast"]
        assert set(fast) <= set("QKVSPmlO") and not {"S", "P"} <= set(fast)
        for name in set(fast) & {"S", "P"}: assert (len(fast[name]), len(fast[name][0])) == (3, 4)


@pytest.mark.parametrize("causal", [False, True])
def test_the_clock_ticks_with_products(causal):
    frames, products = walk_trace(*qkv(), causal), dict(tiled=0, naive=0)
    done = next(n for n, f in enumerate(frames) if f["tiled"]["phase"] == "done")
    for a, b in zip(frames, frames[1:done + 1]):
        products["tiled"] += b["tiled"]["phase"] in ("scores", "fold")
        products["naive"] += b["naive"]["phase"] in ("scores", "output") and a["naive"] != b["naive"]
        assert 0 <= products["tiled"] - products["naive"] <= 3     # three steps of softmax stand between the products
    assert products["tiled"] == (12 if causal else 18)
    assert frames[-1]["naive"] == naive_trace(*qkv(), causal)[-1] and frames[-1]["tiled"]["phase"] == "done"


# ---- the page ----

class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs): self.found.append((tag, dict(attrs)))


def data_of(page): return json.loads(re.search(r"<script>const W = (.*);\n", page).group(1).replace("<\\/", "</"))


def test_the_page_survives_its_frame_and_needs_nobody():
    walk = tile_walk(*qkv(), causal=True)
    (tag, attrs), = Elements(walk._repr_html_()).found
    assert tag == "iframe" and attrs["srcdoc"] == walk.page and attrs["title"]
    assert not re.search(r'[<>"]', re.search(r'srcdoc="(.*?)" title', walk._repr_html_(), re.S).group(1))
    elements = Elements(walk.page).found
    assert not {"src", "href", "data", "action"} & {name for _, attrs in elements for name in attrs}
    assert not {"link", "img", "object", "iframe"} & {tag for tag, _ in elements}
    assert not re.search(r"https?:|//[a-z]|@import|fetch\(|XMLHttp|import\(|url\((?!#hatch)", walk.page)
    assert walk.page.count("<script>") == walk.page.count("</script>") == 1
    assert "```" not in walk.page                                  # would end the block in which Quarto passes it on


def test_no_text_in_the_data_ends_the_script_or_the_attribute():
    walk = tile_walk(*qkv())
    nasty = "</script><b title=\"x\">'&amp;"
    walk = replace(walk, frames=[dict(tiled=dict(walk.frames[0]["tiled"], say=nasty), naive=walk.frames[0]["naive"]),
                                 *walk.frames[1:]])
    assert walk.page.count("</script>") == 1
    (_, attrs), = Elements(walk._repr_html_()).found
    assert data_of(attrs["srcdoc"])["frames"][0]["tiled"]["say"] == nasty


def test_the_page_holds_the_record():
    walk = tile_walk(*qkv(q_len=5, k_len=3), causal=True)                # the first two rows see nothing
    data = data_of(walk.page)
    assert len(data["frames"]) == len(walk.frames) and data["blocks"] == [4, 4]
    for shown, f in zip(data["frames"], walk.frames):
        for side in ("tiled", "naive"):
            assert all(shown[side][name] == f[side][name] for name in ("say", "phase", "read", "written"))
        for name, x in f["tiled"]["fast"].items():
            torch.testing.assert_close(torch.tensor(shown["tiled"]["fast"][name]).float(), torch.tensor(x).float(),
                                       rtol=0, atol=6e-3)
    assert data["O"][:2] == [[0] * 4] * 2 and "NaN" not in walk.page.split("const $")[0]


def test_what_the_script_asks_for_is_there():
    page = tile_walk(*qkv()).page
    ids = {attrs["id"] for _, attrs in Elements(page).found if "id" in attrs}
    assert set(re.findall(r"\$\('([\w-]+)'\)", page)) <= ids
    for side in ("naive", "tiled"): assert {side, side + "-say", side + "-moved"} <= ids
    for tag, attrs in Elements(page).found:
        if tag in ("button", "input"): assert attrs["aria-label"]


@pytest.mark.parametrize("shape", [(12, 12, 4), (16, 16, 5)])
def test_the_page_is_small(shape):
    assert len(tile_walk(*qkv(*shape))._repr_html_().encode()) < (60_000 if shape[0] == 12 else 80_000)


def test_it_says_what_it_is_without_html():
    said = repr(tile_walk(*qkv(), causal=True))
    assert said == ("TileWalk: 12 queries, 12 keys, head_dim 4, tiles 4 × 4, causal; 34 frames; "
                    "bytes: naive 7680, tiled 2400")


# ---- the strip ----

def test_the_strip_shows_its_frames(tmp_path):
    walk = tile_walk(*qkv(), causal=True)
    fig = tile_strip(walk, [0, 3, 4, len(walk.frames) - 1])
    assert [ax.get_title() for ax in fig.axes[:4]] == ["frame 0", "frame 3", "frame 4", "frame 33"]
    assert [ax.get_xlabel() for ax in (fig.axes[3], fig.axes[7])] == ["7,680 bytes", "2,400 bytes"]
    tile = torch.tensor(walk.frames[4]["tiled"]["fast"]["P"])
    drawn = torch.tensor(fig.axes[6].images[1].get_array().filled(torch.nan))
    torch.testing.assert_close(drawn[:4, :4].float(), tile)
    assert drawn[4:].isnan().all() and drawn[:, 4:].isnan().all()
    fig.savefig(tmp_path / "strip.png")
    assert fig._repr_png_()[:4] == b"\x89PNG"
    assert len(tile_strip(tile_walk(*qkv(1, 1, 1))).axes) == 12
    for frames in ([], [-1], [len(walk.frames)]):
        with pytest.raises(ValueError, match="give numbers from 0 to 33"): tile_strip(walk, frames)


# ---- bad input ----

@pytest.mark.parametrize("change, error, culprit", [
    (dict(q=[[1.0]]), TypeError, "q is a list"),
    (dict(q=torch.zeros(1, 1, 12, 4, dtype=torch.float64)), ValueError, "one head"),
    (dict(q=torch.zeros(128, 4, dtype=torch.float64)), ValueError, "picture for small tensors"),
    (dict(v=torch.zeros(12, 64, dtype=torch.float64)), ValueError, "v is 12 × 64"),
    (dict(k=torch.zeros(0, 4, dtype=torch.float64)), ValueError, "k is 0 × 4"),
    (dict(q=torch.zeros(12, 4, dtype=torch.int64)), ValueError, "float32"),
    (dict(k=torch.zeros(12, 4)), ValueError, "k is torch.float32"),
    (dict(k=torch.full((12, 4), torch.nan, dtype=torch.float64)), ValueError, "k contains NaN or Inf"),
    (dict(k=torch.zeros(11, 4, dtype=torch.float64)), ValueError, "one shape"),
    (dict(q=torch.zeros(12, 3, dtype=torch.float64)), ValueError, "same head_dim"),
    (dict(causal=1), TypeError, "causal"), (dict(block_q=0), ValueError, "block_q is 0"),
    (dict(block_k=2.0), ValueError, "block_k is 2.0"), (dict(block_q=True), ValueError, "block_q is True"),
    (dict(block_q=7), ValueError, "1 to 6"), (dict(block_q=2, block_k=2), ValueError, "36 tiles")])
def test_what_cannot_be_drawn_is_refused_in_a_sentence(change, error, culprit):
    with pytest.raises(error, match=re.escape(culprit)) as raised: tile_walk(**{**dict(zip("qkv", qkv())), **change})
    assert "\n" not in str(raised.value)
