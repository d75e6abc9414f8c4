"""Is this attention as exact as plain PyTorch? The criterion, the cases and the judge, for every backend's tests.

The criterion is flash-attention's own: against attention in float64, the output and each gradient may be off by at
most twice what plain PyTorch is off in the same dtype, both taken at the number that is worst.

    error(ours) ≤ 2 · max(error(plain), expected)

Plain PyTorch's error is a throw of dice, however, and small tensors throw few: with one key the weight is 1, whatever
the score, and twice an error of nothing is nothing. flash-attention's tests add the error that rounding makes in the
result itself. Two other devices are used here, which keep the bound tighter where tensors are large.

* `plain` is computed in three arrangements, equal on paper (q scaled, k scaled, the scores scaled; the keys or the
  numbers of a head in reverse order), and the largest of the three errors counts.
* `expected` says how far plain PyTorch should be off, whatever it happened to throw: every number that it writes down
  is rounded, by at most u·|x| (u is half the distance from 1 to the next number of the dtype), and roundings are
  independent, so those that meet in a sum add up as the root of their squares: the usual probabilistic account of
  rounding (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").

Nothing else is added, no dtype is an exception, and no constant is tuned. In float64 the judge is of the same
precision as the judged; then `error` is the difference of two computations that are both rounded.
"""
import math

import torch
from hypothesis import strategies as st

from flash_transformer.attention import AttentionMask

NAMES = ("output", "dq", "dk", "dv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RULES = ("causal", "lengths", "window", "alibi")


# ---- the judge ----

def allowed(batch, q_len, k_len, causal, lengths, window):
    "The definition, element by element in three index grids, without AttentionMask: who sees whom, and how far it is"
    b, i, j = torch.meshgrid(torch.arange(batch), torch.arange(q_len), torch.arange(k_len), indexing="ij")
    ahead = j - i - k_len + q_len
    see = torch.ones(batch, q_len, k_len, dtype=torch.bool)
    if causal: see &= ahead <= 0
    if lengths is not None: see &= j < torch.tensor(lengths)[b]
    if window is not None and window[0] >= 0: see &= ahead >= -window[0]
    if window is not None and window[1] >= 0: see &= ahead <= window[1]
    return see[:, None], ahead.abs()[:, None]  # b 1 q k


def plain(q, k, v, see, bias, scale, scaled="q"):
    "Attention as one writes it in an hour, in the dtype of q; rows that see nothing are left out by hand"
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if scaled == "q": scores = (q * scale) @ k.mT
    if scaled == "k": scores = q @ (k * scale).mT
    if scaled == "scores": scores = (q @ k.mT) * scale
    if bias is not None: scores = scores + bias.to(q.dtype)
    rows = see.any(-1, keepdim=True)
    weights = scores.masked_fill(~see & rows, -torch.inf).softmax(-1)
    return torch.where(rows, weights @ v, 0)


def with_gradients(f, inputs, direction):
    "f's output, and the gradients of (output · direction).sum() for each input; without a direction the output alone"
    if direction is None:
        with torch.no_grad(): return [f(*inputs)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = f(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, direction.to(out.dtype))]


def arrangements(q, k, v, direction, see, bias, scale):
    "`plain` with its gradients three times, rounded in other places each time"
    for scaled, turned in (("q", []), ("k", [2]), ("scores", [1, 2, 3])):       # heads, words, numbers of a head
        if q.dtype == torch.float64 and not turned: continue                    # that is the judge
        pair = [3, 2] if 2 in turned else []                                    # the words of a mask: queries and keys
        there, how_far = see.flip(pair), bias if bias is None else bias.flip(pair + [1] * (1 in turned))
        found = with_gradients(lambda *x: plain(*x, there, how_far, scale, scaled),  # noqa: B023
                               [x.flip(turned) for x in (q, k, v)], direction.flip(turned))
        yield [x.flip(turned) for x in found]


def joined(*errors): return sum(e * e for e in errors) ** 0.5          # independent errors of one number
def meeting(a, b): return (a.square() @ b.square()).sqrt()             # … of the terms of the sums a @ b


def others(w):
    "Sums of each row without the number itself; adding, never subtracting, so that 1 does not swallow what is tiny"
    def before(x): return torch.cat([torch.zeros_like(x[..., :1]), x.cumsum(-1)[..., :-1]], dim=-1)
    return before(w) + before(w.flip(-1)).flip(-1) if w.shape[-1] else w


def expected(q, k, v, direction, see, bias, scale, dtype, exact_scores=False):
    "How far `plain` in this dtype should be off, number by number; the arguments are in float64"
    limits, kv_heads, group, d = torch.finfo(dtype), k.shape[1], q.shape[1] // k.shape[1], q.shape[3]
    u, tiny = limits.eps / 2, limits.smallest_normal * limits.eps / 2
    fine = min(u, 2**-24)                           # inside, numbers are kept in float32 at least
    def rounded(x): return u * x.abs() + tiny
    def length(x): return x.norm(dim=-1, keepdim=True)
    def shared(x, off):                             # the heads of a group meet in one sum, rounded before and after
        off, total = (y.unflatten(1, (kv_heads, group)) for y in (joined(off, rounded(x)), x))
        return joined(off.norm(dim=2), rounded(total.sum(2)) if group > 1 else 0)
    # A sum of n terms also rounds its partial sums. They wander off by √n and drift towards the total: the root of
    # the sum of their squares is √(n/2) times that of the terms, and √(n/3) times the total.
    def wander(n): return fine * (n / 2) ** 0.5
    def drift(n, total): return fine * (n / 3) ** 0.5 * total
    n_keys, n_queries = see.sum(-1, keepdim=True), see.sum(-2, keepdim=True) * group
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))

    # The scores: q · scale is rounded, the product, and the sum with ALiBi's term, itself rounded. Where all of that
    # has few enough binary digits (exact_scores), only what a kernel does in float32 is left: exponents, logarithms.
    scores, terms = q @ k.mT * scale, meeting(q, k.mT) * scale
    summed = 0 if exact_scores else joined(wander(d) * terms, drift(d, scores))
    numbers = joined(terms, scores)
    if bias is not None: numbers, scores = joined(numbers, bias, scores + bias), scores + bias
    off = joined((fine if exact_scores else u) * numbers, summed)
    # The weights: the odds of a key are changed by its own score's error, and by those of its rivals, as far as they
    # do not cancel. This is not linear: in half precision a score of 10,000 may be off by 20.
    scores = scores.masked_fill(~see, -torch.inf)
    w, lse = scores.softmax(-1).nan_to_num(0), scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=0)
    rest = others(w)
    rivals = torch.minimum(length(w * off) / rest, off.amax(-1, keepdim=True)) if w.numel() else w
    odds = joined(off, rivals).clamp(max=300).exp()
    moved = torch.maximum(w * odds / (w * odds + rest) - w, w - w / (w + rest * odds)).nan_to_num(0)
    off_w = joined(moved, rounded(w)) * see
    out = w @ v
    off_out = joined(meeting(joined(off_w, wander(n_keys) * w), v), drift(n_keys, out), rounded(out))

    # The backward pass: dv = wᵀ·direction, dw = direction·vᵀ, ds = w ∘ (dw − D) with D = rowsum(direction ∘ out).
    # FlashAttention computes the weights anew, exp(score − log Σ exp), from the one number that it has kept of a row:
    # errors of scores and logarithm (in float32) do not cancel here, as they do where the sum is taken afterwards.
    off_w = joined(off_w, w * joined(fine * numbers, fine * lse, summed))
    dw, delta = direction @ v.mT, (direction * out).sum(-1, keepdim=True)
    off_dw = joined(wander(d) * meeting(direction, v.mT), drift(d, dw), rounded(dw))
    off_delta = joined(length(moved * (dw - delta)), length(rounded(w) * dw), length(w * off_dw),
                       length(direction * joined(rounded(out), wander(d) * out)), drift(d, delta), rounded(delta))
    ds, most = w * (dw - delta), w + moved
    off_ds = joined(off_w * (dw - delta), most * off_dw, rounded(ds))           # and −w · off_delta, a whole row alike
    dq, dk, dv = ds @ k * scale, ds.mT @ q * scale, w.mT @ direction
    off_dk = meeting(joined(off_ds, most * off_delta, wander(n_queries) * ds).mT, q) * scale
    off_dv = meeting(joined(off_w, wander(n_queries) * w).mT, direction)
    return [off_out,
            joined(meeting(joined(off_ds, wander(n_keys) * ds), k) * scale, off_delta * (most @ k) * scale,
                   drift(n_keys, dq), rounded(dq)),
            shared(dk, joined(off_dk, drift(n_queries.mT, dk))), shared(dv, joined(off_dv, drift(n_queries.mT, dv)))]


def worst(x): return x.abs().max().item() if x.numel() else 0.


class Judged:
    "What is right (`exact`: output, dq, dk, dv in float64), how far plain PyTorch is off, and how far one may be off"

    def __init__(self, q, k, v, direction, see, bias, scale, exact_scores=False):
        self.inputs, self.direction = (q, k, v), direction
        self.hidden = ~see.any(-1).expand(q.shape[:3])                          # rows that see nothing
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        doubles = [x.double() for x in (q, k, v)]
        with torch.no_grad():
            self.expected = [worst(e) for e in expected(*doubles, direction.double(), see, bias, scale, q.dtype,
                                                        exact_scores)]
        self.exact = with_gradients(lambda *x: plain(*x, see, bias, scale), doubles, direction)
        self.plain = [0.] * 4
        for found in arrangements(q, k, v, direction, see, bias, scale):
            errors = [worst(x - right) for x, right in zip(found, self.exact)]
            # where fp16 overflows in one order of multiplying, that order is no measure
            if all(e < torch.inf for e in errors): self.plain = list(map(max, self.plain, errors))
        self.bounds = [2 * max(pair) for pair in zip(self.plain, self.expected)]

    def ratios(self, found):
        "Error over bound, for output, dq, dk and dv: up to 1 is right. Wrong shapes and dtypes are infinitely wrong"
        for ours, right in zip(found, self.exact):
            if ours.shape != right.shape or ours.dtype != self.direction.dtype: return [torch.inf] * 4
        errors = [worst(x - right) for x, right in zip(found, self.exact)]
        return [torch.inf if e != e else e / bound if bound else e and torch.inf
                for e, bound in zip(errors, self.bounds)]

    def check(self, found, who):
        "Raises AssertionError, with figures, unless output (and gradients) are within the bounds, and hidden rows zero"
        for name, ratio, x, right, bound in zip(NAMES, self.ratios(found), found, self.exact, self.bounds):
            assert ratio <= 1, (f"{who}, {name}: {tuple(x.shape)} {x.dtype}, off by {worst(x - right):.3g}, "
                                f"allowed are {bound:.3g}" if x.shape == right.shape else
                                f"{who}, {name}: {tuple(x.shape)} instead of {tuple(right.shape)}")
        assert not any(x[self.hidden].any() for x in found[:2]), f"{who}: rows that see nothing are not 0"


# ---- the cases ----

COIN, SEED = st.booleans(), st.integers(0, 2**31)
SCORES = ("ordinary", "ordinary", "ordinary", "ordinary", "wide", "all near 10000", "grid", "extreme by q",
          "extreme by q and k", "extreme by scale")
SCALES = (None, None, 0.3, 1.0, -0.5)
HEAD_DIMS = (1, 2, 3, 5, 8, 8, 16, 16, 20, 32, 32, 40, 64, 64, 80, 128, 256)
# Up to this length, batch, key heads, query heads for each. Most are small, where edges meet
SIZES = ((20, 3, 3, 4),) * 14 + ((80, 2, 2, 2),) * 4 + ((300, 1, 1, 2),)
FEWER = ((20, 2, 2, 2),) * 14 + ((80, 1, 1, 2),) * 4 + ((300, 1, 1, 1),)         # for kernels in an interpreter


def pick(draw, choices): return draw(st.sampled_from(choices))


def draw_rules(draw, which, batch, q_len, k_len):
    "The rules of a mask, as plain numbers"
    on, longest = draw(st.integers(0, 2 ** len(RULES) - 1)), max(q_len, k_len)
    causal, lengths, window, alibi = (rule in which and on >> n & 1 for n, rule in enumerate(RULES))
    side = st.integers(-1, 9 if window and draw(COIN) else longest)
    return dict(causal=bool(causal), window=(draw(side), draw(side)) if window else None,
                lengths=[draw(st.integers(0, k_len)) for _ in range(batch)] if lengths else None,
                alibi=pick(draw, ("per head", "per sentence")) if alibi else None)


def draw_sizes(draw, choices, head_dims):
    longest, batch, kv_heads, group = (draw(st.integers(1, n)) if i else n for i, n in enumerate(pick(draw, choices)))
    q_len, k_len = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    return dict(batch=batch, heads=kv_heads * group, kv_heads=kv_heads, q_len=q_len, k_len=k_len,
                head_dim=pick(draw, head_dims))


def draw_numbers(draw, dtypes):
    "What the tensors are filled with"
    dtype = pick(draw, dtypes)
    scores = pick(draw, SCORES[:-1] if dtype == torch.float16 else SCORES)      # by scale, gradients go beyond 65504
    return dict(dtype=dtype, scores=scores, scale=pick(draw, SCALES), seed=draw(SEED))


@st.composite
def cases(draw, dtypes=DTYPES, sizes=SIZES, head_dims=HEAD_DIMS, which=RULES):
    "Random cases for `Problem`, as a dict of plain numbers that tells what a failure is about"
    size = draw_sizes(draw, sizes, head_dims)
    if draw(COIN) and draw(COIN): size["q_len"] = size["k_len"]
    rules = draw_rules(draw, which, size["batch"], size["q_len"], size["k_len"])
    return size | draw_numbers(draw, dtypes) | rules | dict(turned=draw(COIN))  # (batch, length, heads, …) in memory


@st.composite
def packed_cases(draw, dtypes=DTYPES, sizes=SIZES, head_dims=HEAD_DIMS, which=("causal", "window", "alibi")):
    "Random cases for `Packed`: up to four sequences, some of them without queries or keys"
    size = draw_sizes(draw, sizes, head_dims)
    length = st.sampled_from([0, 0, 1, size["q_len"], size["k_len"]])
    each = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    longest = max(size["q_len"], size["k_len"])
    size |= dict(batch=len(each), q_len=sum(q for q, _ in each), k_len=sum(k for _, k in each), each=each)
    return size | draw_numbers(draw, dtypes) | draw_rules(draw, which, len(each), longest, longest)


def fill(batch, heads, kv_heads, q_len, k_len, head_dim, dtype, scores, scale, seed):
    "q, k, v, a direction for the gradient (in the dtype), the slopes for ALiBi, the scale, are the scores exact?"
    g = torch.Generator().manual_seed(seed)
    q, k, v, direction = (torch.randn(batch, h, n, head_dim, generator=g) for h, n in
                          ((heads, q_len), (kv_heads, k_len), (kv_heads, k_len), (heads, q_len)))
    slopes = torch.rand(batch, heads, generator=g)
    factor, root = abs(head_dim ** -0.5 if scale is None else scale) or 1, head_dim ** 0.5
    if scores == "wide": q = q * 10                                             # weights near 0 and near 1
    if scores == "all near 10000": q, k = (x + (1e4 / head_dim / factor) ** 0.5 for x in (q, k))
    if scores == "extreme by q and k": q, k = (x * (4e3 / root / factor) ** 0.5 for x in (q, k))
    if scores == "extreme by q": q = q * (4e3 / root / factor)
    if scores == "extreme by scale": scale = 4e3 / root
    if scores == "grid":                                # few binary digits: every dtype holds these scores exactly
        q, k, scale = *(x.round().clamp(-1, 1) * 16 for x in (q, k)), 2. ** round(5 - math.log2(root))
    q, k, v, direction = (x.to(dtype) for x in (q, k, v, direction))
    return q, k, v, direction, slopes, scale, scores == "grid"


class Problem(Judged):
    "A case of `cases` made into tensors, and judged: `problem.check(problem.solve(f), 'f')`"

    def __init__(self, case):
        case = dict(case)
        turned, names = case.pop("turned"), ("causal", "lengths", "window", "alibi")
        causal, lengths, window, alibi = (case.pop(name) for name in names)
        q, k, v, direction, slopes, self.scale, exact_scores = fill(**case)
        if turned: q, k, v, direction = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, direction))
        see, distance = allowed(len(q), q.shape[2], k.shape[2], causal, lengths, window)
        slopes = None if alibi is None else slopes[0] if alibi == "per head" else slopes
        bias = None if slopes is None else -slopes.double()[..., None, None] * distance
        if not (causal or lengths or window or alibi): self.mask = None
        else: self.mask = AttentionMask(causal, lengths, window, slopes)
        super().__init__(q, k, v, direction, see, bias, self.scale, exact_scores and bias is None)

    def solve(self, attend, device="cpu", backward=True):
        "Output and gradients of attend(q, k, v, mask, scale), computed on that device; or the output alone"
        found = with_gradients(lambda q, k, v: attend(q, k, v, self.mask, self.scale),
                               [x.to(device) for x in self.inputs], self.direction.to(device) if backward else None)
        return [x.cpu() for x in found]


class Packed:
    "A case of `packed_cases` made into packed tensors; every sequence is judged by itself"

    def __init__(self, case):
        case = dict(case)
        sequences, lengths, names = case["batch"], case.pop("each"), ("causal", "lengths", "window", "alibi")
        causal, _, window, alibi = (case.pop(name) for name in names)
        *tensors, slopes, self.scale, exact_scores = fill(**case | dict(batch=1))
        *self.inputs, self.direction = (x[0].transpose(0, 1) for x in tensors)          # total h d
        q_lens, k_lens = zip(*lengths)
        self.cu_q, self.cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, k_lens))
        slopes = slopes * torch.linspace(1, 0.5, sequences)[:, None]
        slopes = None if alibi is None else slopes[0] if alibi == "per head" else slopes
        self.mask = AttentionMask(causal, None, window, slopes) if causal or window or alibi else None
        self.lengths, self.judged = lengths, []
        tensors = (x.split(n, dim=2) for x, n in zip(tensors, (q_lens, k_lens, k_lens, q_lens)))
        for n, parts in enumerate(zip(*tensors)):
            see, distance = allowed(1, *lengths[n], causal, None, window)
            slope = None if alibi is None else slopes if alibi == "per head" else slopes[n]
            bias = None if slope is None else -slope.double()[:, None, None] * distance
            self.judged.append(Judged(*parts, see, bias, self.scale, exact_scores and bias is None))

    def solve(self, attend, device="cpu"):
        "Output and gradients of attend(q, k, v, cu_q, cu_k, mask, scale), all packed, computed on that device"
        cu_q, cu_k = self.cu_q.to(device), self.cu_k.to(device)
        found = with_gradients(lambda q, k, v: attend(q, k, v, cu_q, cu_k, self.mask, self.scale),
                               [x.to(device) for x in self.inputs], self.direction.to(device))
        return [x.cpu() for x in found]

    def check(self, found, who):
        "As `Judged.check`, for each sequence"
        found = [x.transpose(0, 1)[None].split([pair[i in (2, 3)] for pair in self.lengths], dim=2)
                 for i, x in enumerate(found)]
        for n, (judged, parts) in enumerate(zip(self.judged, zip(*found))): judged.check(parts, f"{who}, sequence {n}")
