"""Votes of people, counted: good / same / bad, ratings of many systems, and how far raters agree.

    compare(rows)       of two systems: G, S, B, superiority, win share, net, win rates, sign test
    ranking(rows)       of several: Bradley-Terry
    means, differences  of ratings on a scale
    agreement(votes)    raw, Krippendorff's alpha, Fleiss' and Cohen's kappa

Rows begin with the picture that they are about. Votes about one picture depend on each other, so intervals
are bootstraps over pictures: all votes about one come together, as often as the picture is drawn.
"""

import math
from collections import Counter, defaultdict

import numpy as np

from log import sign_test, wilson


def gsb(good, same, bad):
    """Good, same, bad of A against B, numbers or arrays -> ByteEdit's superiority (G+S)/(S+B) (Sec. 4.3), win
    share (G+S)/(G+2S+B) (its Fig. 6), net (G-B)/n, win rate without ties and with ties as halves.

    The counts of ByteEdit's Fig. 3 give 106, 132 and 112 %. Its text has 105, 163 and 112: the 163 is G/B."""
    good, same, bad = (np.asarray(x, np.float64) for x in (good, same, bad))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {"superiority": (good + same) / (same + bad), "share": (good + same) / (good + 2 * same + bad),
                "net": (good - bad) / (good + same + bad), "win": good / (good + bad),
                "half": (good + same / 2) / (good + same + bad)}


def by_picture(rows):
    """(picture, vector) of every vote -> their sums [pictures, ...]."""
    sums = {}
    for cluster, vector in rows:
        sums[cluster] = sums.get(cluster, 0) + np.asarray(vector, np.float64)
    return np.stack(list(sums.values()))


def resampled(n, draws, seed):
    """How often each of n pictures is in a resample: [draws, n]."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)


def interval(values):
    """Percentiles 2.5 and 97.5 of the finite ones; none: not-a-number."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        return [math.nan, math.nan]
    ends = np.quantile(values, (0.025, 0.975), method="nearest")  # the usual mean of two may be inf - inf
    return [float(x) for x in ends]


def compare(rows, draws=1000, seed=0):
    """(picture, +1 good, 0 same, -1 bad) of every vote -> counts, gsb with intervals over pictures, Wilson's
    of the win rate as if votes were independent, and a sign test over pictures (the majority of each)."""
    counts = by_picture((c, (v > 0, v == 0, v < 0)) for c, v in rows)
    good, same, bad = (int(x) for x in counts.sum(0))
    value, spread = gsb(good, same, bad), gsb(*(resampled(len(counts), draws, seed) @ counts).T)
    sides = np.sign(counts[:, 0] - counts[:, 2])
    return {"good": good, "same": same, "bad": bad, "pictures": len(counts),
            **{k: [float(v), *interval(spread[k])] for k, v in value.items()},
            "wilson": list(wilson(good, good + bad)),
            "p": sign_test(int((sides > 0).sum()), int((sides < 0).sum()))}


def bradley_terry(wins):
    """wins [..., n, n], of row over column, ties as half a win each -> theta [..., n] of mean 0 (maximum
    likelihood, P(i beats j) = 1 / (1 + exp(theta_j - theta_i))), by Newton's method. Not-a-number where it
    has no finite maximum: where not every system has won, over any number of others, against every other."""
    wins = np.asarray(wins, np.float64)
    n = wins.shape[-1]
    flat = wins.reshape(-1, n, n) * (1 - np.eye(n))
    reach = ((flat > 0) | np.eye(n, dtype=bool)).astype(np.float64)
    for _ in range(max(1, math.ceil(math.log2(n)))):
        reach = (reach @ reach > 0).astype(np.float64)
    finite = reach.reshape(len(flat), -1).all(1)
    w, theta = flat[finite], np.zeros((int(finite.sum()), n))
    games = w + w.transpose(0, 2, 1)
    for _ in range(200):
        p = 1 / (1 + np.exp(theta[:, None, :] - theta[:, :, None]))
        gradient, curve = (w - games * p).sum(2), games * p * (1 - p)
        hessian = np.eye(n) * curve.sum(2)[:, :, None] - curve + 1 / n  # 1 / n holds the mean at 0
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0] if len(w) else gradient
        step *= np.minimum(1, 1 / np.maximum(np.abs(step).max(1, keepdims=True, initial=0), 1e-12))
        theta = theta + step
        if not len(w) or np.abs(step).max() < 1e-10:
            break
    out = np.full((len(flat), n), math.nan)
    out[finite] = theta - theta.mean(1, keepdims=True)
    return out.reshape(wins.shape[:-1])


def rating(theta):
    """Chess players' scale: 400 points are odds of 10 to 1, 1000 in the middle."""
    return 1000 + 400 / math.log(10) * np.asarray(theta)


def ranking(rows, names, draws=1000, seed=0):
    """(picture, i, j, +1, 0, -1 of system i against j) -> Bradley-Terry ratings {name: [value, low, high]}
    with intervals over pictures; the share of resamples that have none; P(row beats column)."""
    n, parts = len(names), []
    for cluster, i, j, v in rows:
        one = np.zeros((n, n))
        one[i, j], one[j, i] = (1 + v) / 2, (1 - v) / 2
        parts.append((cluster, one))
    wins = by_picture(parts)
    theta = bradley_terry(wins.sum(0))
    draw = bradley_terry(np.tensordot(resampled(len(wins), draws, seed), wins, 1))
    return {"ratings": {name: [float(rating(theta)[k]), *interval(rating(draw[:, k]))] for k, name in
                        enumerate(names)},
            "without": float(np.isnan(draw[:, 0]).mean()),
            "beats": (1 / (1 + np.exp(theta[None] - theta[:, None]))).tolist()}


def fleiss(counts):
    """counts [items, classes] of equally many raters -> (Fleiss' kappa, raw agreement)."""
    counts = np.asarray(counts, np.float64)
    n = counts.sum(1)
    if len(counts) == 0 or n.min() != n.max() or n[0] < 2:
        raise ValueError("Fleiss' kappa needs the same number of raters, at least two, of every item")
    raw = float(((counts**2).sum(1) - n).sum() / (n * (n - 1)).sum())
    chance = float(((counts.sum(0) / counts.sum())**2).sum())
    return ((raw - chance) / (1 - chance) if chance < 1 else math.nan), raw


def coincidences(values, classes):
    """Values that raters gave an item -> [classes, classes]: each of m counts 1 / (m - 1) with each other."""
    c = np.array([sum(v == x for v in values) for x in classes], np.float64)
    return (np.outer(c, c) - np.diag(c)) / max(1, len(values) - 1)


def alpha(o, classes, level):
    """Krippendorff's alpha of coincidences o [k, k] of sorted classes; level nominal, ordinal or interval.
    Missing votes are allowed. Not-a-number where all values are the same."""
    n = o.sum(1)
    if level == "nominal":
        d = 1 - np.eye(len(n))
    elif level == "ordinal":
        upto, lower = np.cumsum(n), np.minimum.outer(np.arange(len(n)), np.arange(len(n)))
        between = np.abs(upto[:, None] - upto[None]) + n[lower]  # all that lie from one to the other
        d = (between - (n[:, None] + n[None]) / 2)**2
    else:
        x = np.asarray(classes, np.float64)
        d = (x[:, None] - x[None])**2
    expected = (np.outer(n, n) * d).sum() / max(n.sum() - 1, 1e-12)
    return 1 - float((o * d).sum() / expected) if expected > 0 else math.nan


def krippendorff(units, level):
    """Lists of the values of each item -> alpha."""
    units = [u for u in units if len(u) > 1]
    classes = sorted({v for u in units for v in u})
    return alpha(sum(coincidences(u, classes) for u in units), classes, level) if units else math.nan


def cohen(a, b):
    """Two raters' values of the same items -> Cohen's kappa."""
    n, of_a, of_b = len(a), Counter(a), Counter(b)
    chance = sum(of_a[k] * of_b[k] for k in of_a) / n**2
    raw = sum(x == y for x, y in zip(a, b)) / n
    return (raw - chance) / (1 - chance) if chance < 1 else math.nan


def agreement(votes, level, draws=1000, seed=0):
    """(picture, item, rater, value) -> how far raters agree: raw, the share of equal pairs of votes of an
    item; Krippendorff's alpha with its interval over pictures; Fleiss' kappa, of those items that the most
    frequent number of raters saw; Cohen's of two raters. Kappas fall where one answer is frequent: look at
    raw, too."""
    items, of_picture = defaultdict(dict), {}
    for cluster, item, rater, value in votes:
        items[item][rater], of_picture[item] = value, cluster
    items = {i: u for i, u in items.items() if len(u) > 1}
    if not items:
        return {"items": 0}
    classes = sorted({v for u in items.values() for v in u.values()})
    counts = {i: np.array([list(u.values()).count(c) for c in classes], np.float64) for i, u in items.items()}
    pairs = np.sum([c.sum() * (c.sum() - 1) for c in counts.values()])
    parts = by_picture((of_picture[i], coincidences(list(u.values()), classes)) for i, u in items.items())
    drawn = np.tensordot(resampled(len(parts), draws, seed), parts, 1)
    usual, n_usual = Counter(len(u) for u in items.values()).most_common(1)[0]
    people = sorted({r for u in items.values() for r in u})
    out = {"items": len(items), "raw": float(np.sum([(c * (c - 1)).sum() for c in counts.values()]) / pairs),
           "level": level, "alpha": [alpha(parts.sum(0), classes, level), *interval(
               [alpha(o, classes, level) for o in drawn])],
           "fleiss": fleiss([c for c in counts.values() if c.sum() == usual])[0], "fleiss_raters": usual,
           "fleiss_items": n_usual}
    if len(people) == 2:
        out["cohen"] = cohen(*([u[r] for u in items.values()] for r in people))
    return out


def means(rows, draws=1000, seed=0):
    """(picture, rater, values [k]) -> mean [k], its interval over pictures, and the deviation of the raters'
    own means (nan of one), as ImagenHub reports it."""
    sums = by_picture((c, [*v, 1]) for c, _, v in rows)
    drawn = resampled(len(sums), draws, seed) @ sums
    own = by_picture((r, [*v, 1]) for _, r, v in rows)
    own = own[:, :-1] / own[:, -1:]
    total = sums.sum(0)
    return [[float(total[k] / total[-1]), *interval(drawn[:, k] / drawn[:, -1]),
             float(own[:, k].std(ddof=1)) if len(own) > 1 else math.nan] for k in range(len(total) - 1)]


def differences(a, b, draws=1000, seed=0):
    """As `means`, two systems: mean of a minus mean of b and its interval, pictures resampled together."""
    k = len(a[0][2])
    none = [0] * (k + 1)
    sums = by_picture([(c, [*x, 1, *none]) for c, _, x in a] + [(c, [*none, *x, 1]) for c, _, x in b])
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = resampled(len(sums), draws, seed) @ sums
        gap = drawn[:, :k] / drawn[:, k:k + 1] - drawn[:, k + 1:-1] / drawn[:, -1:]
    total = sums.sum(0)
    return [[float(total[j] / total[k] - total[k + 1 + j] / total[-1]), *interval(gap[:, j])]
            for j in range(k)]
