"""Text features and latents that make_cache.py made: what is in a cache, and how it is read.

Every entry has a CRC-32, which is checked whenever it is read. make_cache.py describes the files.
"""

import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import checkpoint
from pretrained.files import header_hash
from readers.files import BadFile, printable, size_of

CLIP_TOKENS = 77
FLAGS = ("base", "data", "split", "edits", "text", "tokenizers", "t5", "t5_length", "dtype", "latents",
         "image_size", "aspects", "stride", "limit", "text_shard", "shard")  # of make_cache.py: what it made


def key_of(caption: str) -> int:
    """int64 by which a text is found; the whole of it goes into its entry's CRC, so a clash is noticed."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little", signed=True)


HASHED = {"source": "fingerprint", "base": "weights", "text": "text_hash",
          "tokenizers": "tokenizers_hash"}  # a path may move


def differences(made: dict, asked: dict) -> str:
    """What differs, in words."""
    told = []
    for key in dict.fromkeys((*made, *asked)):
        by = HASHED.get(key, key)
        if key in ("data", *HASHED.values()) or made.get(by) == asked.get(by):
            continue
        has, wants = made.get(key), asked.get(key)
        told.append(f"{key} {has} with other contents" if has == wants else f"{key} {has}, not {wants}")
    return "; ".join(told)


def text_crc(caption: str, row: dict[str, Tensor]) -> int:
    return crc(caption.encode(), row["clip"], row["pooled"], *([row["t5"]] if "t5" in row else []))


def crc(start: bytes, *tensors: Tensor) -> int:
    value = zlib.crc32(start)
    for t in tensors:
        value = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy(), value)
    return value


def latent_crc(i: int, record: bytes, at, size, *tensors: Tensor) -> int:
    return crc(np.array([i, *at, *size], np.int64).tobytes() + record, *tensors)


####################################################################################################
# Reading
####################################################################################################


def command(made: dict) -> str:
    """The command that made, or repairs, a cache, but for --out."""
    return "python make_cache.py " + " ".join(f"--{k} {made[k]}" for k in FLAGS if k in made)


def open_cache(path: str, source=None, base: str | None = None, **asked) -> "Cache":
    """A finished cache, checked against what training asks for -> Cache. SystemExit with what differs.

    source: the opened data source it must be of; base: the weights; asked: any of image_size, aspects,
    stride, t5_length, dtype, edits, split, latents. Sizes of files are checked here, contents when read.
    """
    root = Path(path)
    try:
        manifest = json.loads((root / "manifest.json").read_bytes())
        made, files = manifest["made"], manifest["files"]
    except FileNotFoundError:
        raise SystemExit(f"error: {path}: no manifest.json: no cache, or not a finished one: run "
                         "make_cache.py with this --out until it ends") from None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise SystemExit(f"error: {path}/manifest.json: damaged ({printable(str(e))[:80]}): run "
                         "make_cache.py with this --out again") from None
    again = f"run again: {command(made)} --out {path}"
    for name, told in files.items():
        try:
            size = (root / name).stat().st_size
        except OSError:
            size = None
        if size != told["bytes"]:
            what = "missing" if size is None else f"{size} bytes instead of {told['bytes']}"
            raise SystemExit(f"error: {path}/{name}: {what}: {again}")
    if checkpoint.sha256(root / "index.safetensors") != files["index.safetensors"]["sha256"]:
        raise SystemExit(f"error: {path}/index.safetensors: SHA-256 differs from the manifest's: {again}")
    if base is not None:
        asked |= {"base": base, "weights": header_hash(base)}
    if source is not None:
        asked |= {"source": source.name, "fingerprint": source.fingerprint(made.get("limit", len(source)))}
    if told := differences({k: made.get(k) for k in asked}, asked):
        raise SystemExit(f"error: {path}: a cache of {told}: give the same flags, or make another cache")
    return Cache(path, manifest)


class Cache:
    """Text features by caption, and latents in place of a source's pictures; shards are mapped, not read."""

    def __init__(self, path: str, manifest: dict):
        self.path, self.made, self.open = str(path), manifest["made"], {}
        index = load_file(Path(path) / "index.safetensors")
        self.keys = index["keys"].numpy()
        self.sizes = index["sizes"].numpy() if "sizes" in index else None

    def __getstate__(self):
        return self.__dict__ | {"open": {}}  # a worker maps its own

    def shard(self, kind: str, k: int) -> dict[str, Tensor]:
        name = f"{kind}_{k:05d}.safetensors"
        if name not in self.open:
            try:
                self.open[name] = load_file(Path(self.path) / name)
            except (OSError, SafetensorError) as e:
                raise self.damaged(name, printable(str(e))[:80]) from None
        return self.open[name]

    def damaged(self, name: str, what: str) -> BadFile:
        return BadFile(f"{self.path}/{name}", f"damaged ({what})",
                       f"run again: {command(self.made)} --out {self.path}")

    def _text(self, caption: str) -> tuple[Tensor, ...]:
        key, made = key_of(caption), self.made
        place = int(np.searchsorted(self.keys, key))
        if place == len(self.keys) or self.keys[place] != key:
            raise SystemExit(f"error: {self.path}: has no text features of {caption[:200]!r}: cache the data "
                             f"and split that it comes from; this one was made by: {command(made)}")
        k, i = divmod(place, made["text_shard"])
        shard = self.shard("text", k)
        row = {key: shard[key][i] for key in ("clip", "pooled", "t5") if key in shard}
        if text_crc(caption, row) != shard["crc"][i]:
            raise self.damaged(f"text_{k:05d}.safetensors", f"the entry of {caption[:80]!r}")
        return tuple(row.values())

    def text(self, captions: list[str], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """[B] captions -> txt [B, 77 + T, D], vec [B, Dv] as SD3Text.encode_text gave them, in --dtype.

        SystemExit naming a caption that was not cached. The target captions of edits are not."""
        width, t5_length = int(self.shard("text", 0)["width"]), self.made["t5_length"]
        rows = [self._text(c) for c in captions]
        txt = rows[0][0].new_zeros(len(rows), CLIP_TOKENS + t5_length, width)
        for out, (clip, _, *t5) in zip(txt, rows):
            out[:CLIP_TOKENS, :clip.shape[-1]] = clip
            if t5:
                out[CLIP_TOKENS:] = t5[0]
        vec = torch.stack([row[1] for row in rows])
        return txt.to(device), vec.to(device)

    def source(self, source) -> "Latents":
        """The data source with latents in place of its pictures, for the loaders of data.py."""
        if not self.made["latents"]:
            raise SystemExit(f"error: {self.path}: holds text only: make a cache with --latents True")
        return Latents(self, source)


class Latents:
    """A source of pictures or edit pairs whose .load gives float32 latents, [C, h, w] for pictures and [h, w]
    for masks. Everything else is the source's, so the loaders keep their order; bad pictures stay bad."""

    latents = True

    def __init__(self, cache: Cache, source):
        self.cache, self.inner, self.drawn = cache, source, size_of(source, 0) is None
        self.name, self.sizes = source.name, cache.sizes

    def __getattr__(self, name):
        if name in ("runs", "window", "tasks", "task", "task_of", "score", "scores", "wrong", "bad_lines",
                    "missing"):
            return getattr(self.inner, name)
        raise AttributeError(name)

    def __len__(self):
        return self.cache.made["items"]

    def size(self, i):
        if not self.drawn and not self.sizes[i].any():
            self.load(i, 0, 0)  # says what is wrong with it
        return None if self.drawn else tuple(self.sizes[i].tolist())

    def load(self, i, h, w):
        cache, (k, n) = self.cache, divmod(i, self.cache.made["shard"])
        shard = cache.shard("latents", k)
        raw = shard["record"][int(shard["end"][n - 1]) if n else 0:int(shard["end"][n])].numpy().tobytes()
        *shape, row = at = shard["at"][n].tolist()
        try:
            record = json.loads(raw)
            names = [] if "bad" in record else ["image", "source"] if cache.made["edits"] else ["image"]
            names += ["mask"] * bool(record.get("mask"))
            parts = {name: shard[f"{shape[0]}x{shape[1]}.{name}"][row] for name in names}
            good = latent_crc(i, raw, at, shard["size"][n].tolist(), *parts.values()) == shard["crc"][n]
        except (ValueError, TypeError, AttributeError, LookupError):
            good = False
        if not good:
            raise cache.damaged(f"latents_{k:05d}.safetensors", f"the entry of item {i}")
        if "bad" in record:
            raise BadFile(*record["bad"].removeprefix("error: ").split(": ", 2))
        if [h, w] != shape:
            raise BadFile(f"{cache.path} item {i}", f"cached at {shape[1]}x{shape[0]}, asked for {w}x{h}",
                          "give the loader the cache's image_size, aspects and stride")
        item = {name: part.float().numpy() for name, part in parts.items()}
        texts = record["captions"]
        item |= dict(caption=texts[0], captions=texts)
        if cache.made["edits"]:
            item |= dict(mask=item.get("mask"), target_caption=record["target_caption"], task=self.task(i),
                         score=self.score(i))
        return item
