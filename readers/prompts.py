"""Texts to draw pictures from: read, cleaned of decoration, and chosen to be diverse (ByteEdit Sec. 3.1).

    texts = open_texts("prompts.txt,captions.parquet")
    texts, dropped = undecorated(texts)
    chosen = select(hashed(texts), 10_000, "knn", clusters=256)

ByteEdit: K-means over features of a language model, then the texts with the largest mean distance to their
nearest neighbours. It names neither K nor the number of neighbours nor a quota; what is chosen here is said
at each. ImageReward's vote-k and blind choice stand beside it as controls. All is a function of the seed.
"""

import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from readers.files import BadFile, RowGroups, checked, clean_caption, json_lines, text_of

COLUMNS = ("caption", "prompt", "text", "Prompt", "TEXT")
SELECT = ("knn", "votek", "random")
# Words that praise a picture and say nothing of it; ours, after ByteEdit's three ("unbelievable",
# "fantastic", "brilliant") and what prompts for Midjourney and Stable Diffusion commonly end in.
DECORATIVE = (
    "unbelievable", "unbelivable", "fantastic", "brilliant", "amazing", "stunning", "gorgeous", "awesome",
    "incredible", "breathtaking", "beautiful", "magnificent", "marvelous", "perfect", "epic", "insane",
    "masterpiece", "masterful", "award winning", "award-winning", "best quality", "high quality",
    "highest quality", "ultra quality", "professional", "trending on artstation", "trending on", "artstation",
    "deviantart", "cgsociety", "pinterest", "behance", "highly detailed", "ultra detailed", "ultra-detailed",
    "hyper detailed", "hyperdetailed", "extremely detailed", "insanely detailed", "intricate details",
    "intricate", "ultra realistic", "hyper realistic", "hyperrealistic", "photorealistic", "ultra hd",
    "full hd", "uhd", "hdr", "4k", "8k", "16k", "high resolution", "high res", "sharp focus",
    "octane render", "unreal engine 5", "unreal engine", "vray", "ray tracing", "raytracing")  # fmt: skip
_DECORATION = re.compile(
    r"(?<![\w-])(?:" + "|".join(re.escape(d).replace(r"\ ", r"\s+") for d in
                                sorted(DECORATIVE, key=len, reverse=True)) + r")(?![\w-])", re.I)
# Midjourney's, with what belongs to each: of --no all words, which else would be asked for
_FLAGS = re.compile(
    r"\s(?:--|\u2014)(?:no\s.*?(?=\s(?:--|\u2014)|$)"
    r"|(?:hd|test|testp|creative|uplight|upbeta|tile|fast|relax|turbo)\b"
    r"|(?:style|sref|cref|oref|p|profile)\b(?:\s+\S+)?"
    r"|(?:ar|aspect|v|version|niji|s|stylize|q|quality|c|chaos|seed|iw|w|weird|h|stop|cw|ow|r|repeat)\b"
    r"(?:\s+[\d:.]+)?)", re.I | re.S)


#### 1. texts ################################################################################################
def open_texts(paths):
    """PATH or PATH,PATH of .txt (one a line), .jsonl or .parquet (one of COLUMNS) -> texts, each once."""
    found = {}
    for path in paths.split(","):
        if not Path(path).is_file():
            raise BadFile(path, "no such file", "give .txt, .jsonl or .parquet files, with commas")
        if path.endswith(".parquet"):
            def column(file, kinds):
                if name := next((c for c in COLUMNS if kinds.get(c) in ("string", "large_string")), None):
                    return [name]
                raise BadFile(file, f"no column of texts ({', '.join(COLUMNS)})", "rename one")

            groups = RowGroups([path], column)
            names = [g[3][0] for g in groups.groups][:1]
            rows = [cells[0] for _, cells in groups.light(lambda _: names)] if names else []
        elif path.endswith(".jsonl"):
            def text(row):
                if name := next((c for c in COLUMNS if isinstance(row.get(c), str)), None):
                    return row[name]
                raise ValueError(f"none of {', '.join(COLUMNS)}")

            rows = checked(json_lines(path), text)[0]
        else:
            rows = text_of(Path(path).read_bytes()).splitlines()
        found |= dict.fromkeys(clean_caption(r)[0] for r in rows if isinstance(r, str))
    found.pop("", None)
    if not found:
        raise BadFile(paths, "no texts in it", "give .txt, .jsonl or .parquet files with some")
    return list(found)


def plain(text):
    """A text without its decoration and Midjourney's flags -> (text, words left, words taken out)."""
    kept = _DECORATION.sub(" ", _FLAGS.sub(" ", text))
    taken = sum(len(m.group().split()) for m in _DECORATION.finditer(text))
    kept = re.sub(r"\s*([,.;|])(?:\s*[,.;|])+", r"\1", re.sub(r"\s+", " ", kept))
    kept = re.sub(r"^(?:and|with|of|,|;|\||\s)+|(?:\band|\bwith|,|;|\||\s)+$", "", kept.strip(), flags=re.I)
    return re.sub(r"\s+([,.;])", r"\1", kept).strip(), len(re.findall(r"\w+", kept)), taken


def undecorated(texts, words=3):
    """Texts without decoration, each once -> (texts, Counter of what was dropped and of the words taken out).

    Dropped: those of which less than `words` words stay ("less informative"), and those that were decoration
    by half or more ("decorative-dominated"; both bounds ours)."""
    out, notes = {}, Counter()
    for text in texts:
        kept, left, taken = plain(text)
        notes["words taken out"] += taken
        why = "too little left" if left < words else "mostly decoration" if taken > left else \
              "said before" if kept.lower() in out else None
        if why:
            notes[why] += 1
        else:
            out[kept.lower()] = kept
    return list(out.values()), notes


def hashed(texts, dim=512):
    """Texts -> unit vectors float32 [N, dim]: words and pairs of words, rare ones more (idf), at signed
    hashed places. What stands in for a language model where there is none: it sees words, not meanings."""
    x = np.zeros((len(texts), dim), np.float32)
    rows = []
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        rows.append([zlib.crc32(g.encode()) for g in {*words, *map(" ".join, zip(words, words[1:]))}])
    often = Counter(g for row in rows for g in row)
    for i, row in enumerate(rows):
        for g in row:
            x[i, g % dim] += (1 if g >> 31 else -1) * np.log(1 + len(texts) / often[g])
    return unit(x)


def unit(x):
    """Rows of length 1, [N, D]; a row of zeros stays."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


#### 2. choosing #############################################################################################
def kmeans(x, k, seed=0, steps=25):
    """Unit vectors [N, D] -> cluster of each [N]: greedy k-means++ and Lloyd's steps with the cosine; a
    cluster that runs empty takes the point that is farthest from its own centre."""
    rng, n = np.random.default_rng(seed), len(x)
    k = min(k, n)
    centres = [x[rng.integers(n)]]
    near = 2 - 2 * x @ centres[0]
    while len(centres) < k:  # of a few draws the one that leaves least: fewer clusters are begun twice
        p = np.maximum(near, 0).astype(np.float64)
        draws = rng.choice(n, 2 + int(np.log(k)), p=p / p.sum() if p.sum() > 0 else None)
        left = np.minimum(near[:, None], 2 - 2 * x @ x[draws].T)
        best = np.maximum(left, 0).sum(0).argmin()
        centres.append(x[draws[best]])
        near = left[:, best]
    centres, was = np.stack(centres), None
    for _ in range(steps):
        at, far = np.empty(n, np.int64), np.empty(n, np.float32)
        for a in range(0, n, 8192):  # N x k would be too much at once
            close = x[a:a + 8192] @ centres.T
            at[a:a + 8192], far[a:a + 8192] = close.argmax(1), close.max(1)
        for c in np.flatnonzero(np.bincount(at, minlength=k) == 0):
            i = far.argmin()
            at[i], far[i] = c, 1
        if was is not None and (at == was).all():
            break
        was, sums = at, np.zeros_like(centres)
        np.add.at(sums, at, x)
        centres = unit(sums)
    return at


def neighbours(x, k):
    """Unit vectors [N, D] -> the k nearest others of each, [N, k], and their distances; k < N."""
    who, how = np.empty((len(x), k), np.int64), np.empty((len(x), k), np.float32)
    for a in range(0, len(x), 1024):
        d = 2 - 2 * x[a:a + 1024] @ x.T
        d[np.arange(len(d)), np.arange(a, a + len(d))] = np.inf
        best = np.argpartition(d, k - 1, axis=1)[:, :k]
        who[a:a + 1024] = best
        how[a:a + 1024] = np.sqrt(np.maximum(np.take_along_axis(d, best, 1), 0))
    return who, how


def select(x, n, how="knn", clusters=64, k=10, seed=0):
    """Unit vectors [N, D] -> the indices of n of them, sorted.

    knn (ByteEdit): of every cluster of K-means the points with the largest mean distance to their k nearest
    neighbours in it, but for the farthest 1 %, which is junk more often than not; from a cluster as many as
    the root of its size says (default ours: by size alone, what is common stays common).
    votek (ImageReward, Su et al. 2022): one after the other the point that most points have among their k
    nearest, a vote counting a tenth for every chosen point that the voter sees already; in groups of 20,000.
    """
    rng = np.random.default_rng(seed)
    if not 0 < n <= len(x):
        raise ValueError(f"{n} of {len(x)}")
    if how == "random":
        return np.sort(rng.choice(len(x), n, replace=False))
    chosen = []
    if how == "knn":
        at = kmeans(x, clusters, seed)
        members = [m for m in (np.flatnonzero(at == c) for c in range(at.max() + 1)) if len(m)]
        for m, take in zip(members, quotas([len(m)**0.5 for m in members], [len(m) for m in members], n)):
            near = min(k, len(m) - 1)
            far = neighbours(x[m], near)[1].mean(1) if near else np.zeros(len(m))
            order = m[np.argsort(-far, kind="stable")]
            junk = min(len(m) // 100, len(m) - take)
            chosen += order[junk:junk + take].tolist()
        return np.sort(chosen)
    groups = np.array_split(rng.permutation(len(x)), -(-len(x) // 20_000))
    for m, take in zip(groups, quotas([len(m) for m in groups], [len(m) for m in groups], n)):
        sees = neighbours(x[m], min(k, len(m) - 1))[0] if len(m) > 1 else np.zeros((1, 0), np.int64)
        weight, free = np.ones(len(m)), np.ones(len(m), bool)
        for _ in range(take):
            votes = np.bincount(sees.ravel(), np.repeat(weight, sees.shape[1]), len(m))
            i = int(np.where(free, votes, -1).argmax())
            free[i] = False
            chosen.append(int(m[i]))
            weight[(sees == i).any(1)] /= 10
            weight[i] /= 10
    return np.sort(chosen)


def quotas(shares, limits, n):
    """How many to take from each: n in all, in proportion to `shares` by largest remainders, none more than
    its limit."""
    shares, limits = np.array(shares, float), np.array(limits, float)
    ideal = np.zeros(len(shares))
    while (rest := n - ideal.sum()) > 1e-9:  # what a full one cannot take goes to the others
        open_ = ideal < limits
        ideal = np.minimum(ideal + rest * shares * open_ / (shares * open_).sum(), limits)
    take = np.floor(ideal + 1e-9).astype(np.int64)
    first = np.argsort(np.where(take < limits, take - ideal, 1), kind="stable")
    take[first[:n - take.sum()]] += 1
    return take


def coverage(x, chosen):
    """Mean distance of all points to the nearest chosen one: small where the choice leaves no gap."""
    near = np.concatenate([(x[a:a + 4096] @ x[chosen].T).max(1) for a in range(0, len(x), 4096)])
    return float(np.sqrt(np.maximum(2 - 2 * near, 0)).mean())
