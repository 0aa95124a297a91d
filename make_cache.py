"""Text features and latents on disk: made once, so that training need not encode anything.

    python make_cache.py --base sd3_medium --data omniedit:DIR --edits True --image_size 512 --out CACHE
    torchrun --nproc_per_node=8 make_cache.py ...     # the ranks share out the shards

The same command goes on after any kind of stop, and makes damaged shards anew. In CACHE:

    text_NNNNN.safetensors     CLIP's tokens without their zero half, T5's tokens and the pooled vector of
                               every wording that a loader can draw, of "" and, for pictures, of the erase
                               prompt
    latents_NNNNN.safetensors  every item at its bucket, cropped as the loaders do for evaluation: at the
                               centre, or so that the region of the edit is in it, and never flipped. The
                               mean of the VAE's posterior, encoded in fp32 (on a GPU with torch's default,
                               TF32 in convolutions), kept in fp16 (default ours). Of an edit source, target
                               and, where it has one, the mask: the largest value in each square of the
                               VAE's stride. With them captions, and what was wrong with a bad picture
    NAME.json                  bytes and SHA-256 of a shard
    plan.json, manifest.json   what the shards are made of; written last: a folder without it is no cache yet

Train scripts read it through `open_cache`. Every entry has a CRC-32, which is checked whenever it is read.
"""

import hashlib
import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import checkpoint
import common
import log
import masks
from data import bucket, fit, fit_pair, shapes
from kernels import dispatch
from pretrained import text as text_encoders
from pretrained.files import header_hash
from pretrained.vae import load_vae
from readers.cached import CLIP_TOKENS, differences, key_of, latent_crc, text_crc
from readers.edits import open_edits
from readers.files import MAX_BAD, MAX_CAPTION, BadFile, clean_caption, printable, size_of, too_many
from readers.pictures import open_source

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Config:
    base: str  # SD3 weights: a .safetensors file or a diffusers folder
    data: str  # "scenes", a folder of pictures, a .parquet file / folder; with --edits pairs, PRESET:PATH
    out: str  # folder of the cache
    edits: bool = False  # the data are edit pairs
    split: Literal["train", "heldout", "all"] = "train"  # part of the data; each has its own cache
    limit: int = 0  # how many items of data that are drawn (scenes) are cached
    text: str | None = None  # text encoders that are not in --base: a file or folder (pretrained/text.py)
    tokenizers: str | None = None  # folder of the tokenizers, where they do not come with the text encoders
    t5: bool = True  # False: zeros in place of T5's tokens, which are not stored
    t5_length: int = 77  # number of T5's tokens: part of what the model is trained on
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # precision of the stored text features
    latents: bool = True  # False: text only, for training on pictures (PeFL)
    image_size: int = 512  # side of the square in pixels (with --aspects of a square of equal area)
    aspects: bool = False  # buckets from 1:4 to 4:1 instead of squares
    stride: int = 16  # sides are multiples of it, in pixels: the VAE's stride times the transformer's patch
    text_batch: int = 32  # captions encoded at once
    batch_size: int = 8  # pictures encoded at once
    text_shard: int = 256  # captions in a file, 0.95 MB each for SD3
    shard: int = 1024  # items in a file, 0.13 MB for 512x512, twice that for an edit
    workers: int = 4  # processes that read pictures, per rank
    device: str = "auto"  # auto (a GPU where there is one), cpu or cuda


def main(cfg: Config) -> None:
    check(cfg)
    dist = common.setup(cfg.device, group=False)
    for s in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(s, signal.SIG_DFL)  # what is on disk is all the state there is: nothing to save

    # 1) what there is to do: the same lists on every rank
    source = (open_edits if cfg.edits else open_source)(cfg.data, cfg.split)
    n = items_of(cfg, source)
    out, plan = Path(cfg.out), make_plan(cfg, source, n)
    captions = all_captions(source, n, cfg.edits)
    plan |= {"texts": len(captions), "texts_hash": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
    keep_plan(out, plan, dist.rank)
    texts, parts = shards("text", len(captions), cfg.text_shard), shards("latents", n, cfg.shard)
    every = {**texts, **(parts if cfg.latents else {})}
    mine = list(every)[dist.rank::dist.world]
    bar = log.progress(len(mine), 0, "verify", dist)
    missing = []
    for name in mine:
        missing += [] if verified(out / name) else [name]
        bar.update()
    bar.close()
    common.print0(f"{source.name}: {n:,} items, {len(captions):,} texts; {len(every):,} shards, "
                  f"rank 0 makes {len(missing):,} of its {len(mine):,}")

    # 2) text, then its encoders are freed; until then the VAE waits on the host
    todo = [name for name in missing if name in texts]
    text = None
    if todo:
        # the encoders compute in it too, but not where torch would emulate 16 bits
        computes = DTYPES[cfg.dtype] if dispatch.has_bf16(dist.device) else torch.float32
        text = text_encoders.load_text(cfg.text or cfg.base, cfg.tokenizers, computes, dist.device, cfg.t5,
                                 cfg.t5_length)
        if cfg.t5 and text.t5xxl is None:
            raise SystemExit(f"error: {cfg.text or cfg.base}: holds no T5: name encoders with --text, or say "
                             "--t5 False for zeros in its place")
    vae = load_vae(cfg.base, torch.float32, "cpu") if cfg.latents else None
    if vae and cfg.stride % vae.stride:
        raise SystemExit(f"error: --stride: {cfg.stride}: use a multiple of the VAE's, {vae.stride}")
    room(cfg, out, every, texts, text, vae)
    bar = log.progress(sum(len(texts[name]) for name in todo), 0, "text", dist)
    for name in todo:
        shard = [captions[k] for k in texts[name]]
        write(out / name, text_shard(text, shard, DTYPES[cfg.dtype], cfg.text_batch, bar))
    bar.close()
    del text
    if dist.device.type == "cuda":
        torch.cuda.empty_cache()

    # 3) latents
    todo = [name for name in missing if name in parts]
    if todo:
        make_latents(cfg, source, {name: parts[name] for name in todo}, vae.to(dist.device), dist)
    finish(out, plan, every, captions, dist.rank)
    common.print0(log.peak_memory())
    common.cleanup()


def check(cfg: Config) -> None:
    """Refuse values that cannot work, before anything is opened."""
    common.check_bounds(
        cfg, not_negative=("limit", "workers"),
        at_least_1=("image_size", "stride", "t5_length", "text_batch", "batch_size", "text_shard", "shard"))
    if cfg.image_size % cfg.stride:
        common.refuse(cfg, "image_size", f"use a multiple of --stride, {cfg.stride}")


def items_of(cfg: Config, source) -> int:
    """How many items of the source are cached; SystemExit where the flags do not suit it."""
    if size_of(source, 0) is not None:
        if cfg.limit:
            raise SystemExit(f"error: --limit: {cfg.limit}: {cfg.data} is cached whole: leave it out")
        return len(source)
    if not 0 < cfg.limit <= len(source):
        raise SystemExit(f"error: --limit: {cfg.limit}: {cfg.data} is drawn as it is read: say how many to "
                         f"cache, at most {len(source):,}")
    if cfg.aspects and cfg.latents:
        raise SystemExit(f"error: --aspects: {cfg.data} is drawn at another shape for every batch: cache "
                         "squares, or text only (--latents False)")
    return cfg.limit


####################################################################################################
# What is to be made
####################################################################################################


def all_captions(source, n: int, edits: bool) -> list[str]:
    """The distinct texts, cleaned as the loaders do, in the order of their keys."""
    found = {""} if edits else {"", masks.ERASE_PROMPT}
    for texts in source.texts(n):
        found.update(clean_caption(text)[0] for text in texts)
    return sorted(found, key=key_of)


def make_plan(cfg: Config, source, n: int) -> dict:
    """All that decides what the shards hold, as it is kept in plan.json and asked for by `open_cache`."""
    flags = ("base", "data", "split", "edits", "t5", "t5_length", "dtype", "latents", "text_shard")
    made = {key: getattr(cfg, key) for key in flags}
    made |= {"weights": header_hash(cfg.base), "source": source.name, "items": n}
    if cfg.text:
        made |= {"text": cfg.text, "text_hash": header_hash(cfg.text)}
    if cfg.tokenizers:
        made |= {"tokenizers": cfg.tokenizers, "tokenizers_hash": tokenizers_hash(cfg.tokenizers)}
    if cfg.latents:
        made |= {key: getattr(cfg, key) for key in ("image_size", "aspects", "stride", "shard")}
    if cfg.limit:
        made["limit"] = cfg.limit
    # hashes decide whether a cache fits; the paths only tell where things came from, and name no user
    return {"format": 1, "made": log.portable(made | {"fingerprint": source.fingerprint(n)})}


def tokenizers_hash(folder: str) -> str:
    """Hash over the contents of the tokenizers' files below a folder; SystemExit if there are none."""
    digest, names = hashlib.sha256(), ("vocab.json", "merges.txt", "tokenizer.json")
    files = sorted(p for sub in ("tokenizer", "tokenizer_2", "tokenizer_3") for name in names
                   if (p := Path(folder) / sub / name).is_file())
    if not files:
        raise SystemExit(f"error: --tokenizers: {folder}: holds no tokenizer/, tokenizer_2/, tokenizer_3/: "
                         "name the folder that does")
    for file in files:
        digest.update(f"{file.relative_to(folder)} {checkpoint.sha256(file)}\n".encode())
    return digest.hexdigest()


def keep_plan(out: Path, plan: dict, rank: int) -> None:
    """Write plan.json, or refuse a folder that has shards of another plan."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = json.loads((out / "plan.json").read_bytes())
    except FileNotFoundError:
        return write_json(out / "plan.json", plan, rank)
    except (OSError, ValueError) as e:
        raise SystemExit(f"error: {out}: plan.json cannot be read ({printable(str(e))[:80]}): delete the "
                         "folder, or give another --out") from None
    changed = differences(found.get("made", {}), plan["made"])
    if not changed and found.get("texts_hash") == plan["texts_hash"]:
        return
    if not any(out.glob("*_?????.json")):  # it was begun, and ended before anything was made
        write_json(out / "plan.json", plan, rank)
    else:
        raise SystemExit(f"error: {out}: holds a cache of {changed or 'other texts'}: give another --out, or "
                         "delete the folder")


def shards(kind: str, n: int, size: int) -> dict[str, range]:
    return {f"{kind}_{k:05d}.safetensors": range(at, min(at + size, n))
            for k, at in enumerate(range(0, n, size))}


def room(cfg: Config, out: Path, every: dict, texts: dict, text, vae) -> None:
    """Print what all ranks have still to write, and refuse what does not fit."""
    left = [name for name in every if not (out / name).with_suffix(".json").exists()]
    n_texts, n_items = (sum(len(every[name]) for name in left if (name in texts) == is_text)
                        for is_text in (True, False))
    need, words = 0, []
    if n_texts and text is not None:
        values = CLIP_TOKENS * (text.clip_l.cfg.width + text.clip_g.cfg.width)
        values += sum(c.project or c.width for c in (text.clip_l.cfg, text.clip_g.cfg))
        values += 0 if text.t5xxl is None else cfg.t5_length * text.t5xxl.shared.weight.shape[1]
        each = values * DTYPES[cfg.dtype].itemsize + 16
        need += n_texts * each
        words.append(f"{n_texts:,} texts of {each / 1e6:.3f} MB")
    if n_items:
        every_shape = shapes(cfg.image_size, cfg.stride, *([] if cfg.aspects else [(1,)]))
        area = max(h * w for h, w in every_shape) // vae.stride**2
        each = 2 * area * (2 * vae.channels + 1 if cfg.edits else vae.channels) + 512
        need += n_items * each
        words.append(f"{n_items:,} items of {each / 1e6:.3f} MB")
    free = shutil.disk_usage(out).free
    common.print0(f"needs {need / 2**30:.3f} GiB in {out}, {free / 2**30:.3f} GiB free"
                  + (f" ({', '.join(words)})" if words else ""))
    if 1.02 * need > free:
        raise SystemExit(f"error: {out}: needs {need / 2**30:.3f} GiB, {free / 2**30:.3f} GiB are free: free "
                         "some space, or give --out on another disk")


####################################################################################################
# Making shards
####################################################################################################


def text_shard(text, captions: list[str], dtype: torch.dtype, batch: int, bar) -> dict[str, Tensor]:
    """clip [n, 77, Dl + Dg], t5 [n, T, D] (none without T5), pooled [n, El + Eg], in `dtype`, and crc [n].
    width: of the context, as a scalar."""
    wide, parts = text.clip_l.cfg.width + text.clip_g.cfg.width, []
    for k in range(0, len(captions), batch):
        txt, vec = (t.to("cpu", dtype) for t in text.encode_text(captions[k:k + batch]))
        if not (torch.isfinite(txt).all() and torch.isfinite(vec).all()):
            raise SystemExit("error: --dtype: the text encoders put out numbers that are not finite: use "
                             "bf16 or fp32, or check the weights")
        part = {"clip": txt[:, :CLIP_TOKENS, :wide], "pooled": vec}
        parts.append(part | ({} if text.t5xxl is None else {"t5": txt[:, CLIP_TOKENS:]}))
        bar.update(len(txt))
    out = {key: torch.cat([p[key] for p in parts]).contiguous() for key in parts[0]}
    sums = [text_crc(c, {key: t[i] for key, t in out.items()}) for i, c in enumerate(captions)]
    return out | {"crc": torch.tensor(sums), "width": torch.tensor(txt.shape[-1])}


class Pictures(torch.utils.data.Dataset):
    """Item -> dict(size, shape, record, image, perhaps source and mask), or record["bad"]: what is wrong."""

    def __init__(self, cfg: Config, source):
        self.cfg, self.source = cfg, source

    def __getitem__(self, i):
        if torch.utils.data.get_worker_info():
            torch.set_num_threads(1)
        cfg, size = self.cfg, (0, 0)
        try:
            size = self.source.size(i) or (1, 1)
            h, w = bucket(*size, cfg.image_size, cfg.stride, cfg.aspects)
            item = self.source.load(i, h, w)
            # longer texts are cut by the loaders, which must still see that they are
            texts = [t[:4 * MAX_CAPTION + 1] for t in item.get("captions") or [item["caption"]]]
            told = {"captions": texts}
            if cfg.edits:
                told["target_caption"] = (item.get("target_caption") or "")[:4 * MAX_CAPTION + 1]
                pictures = fit_pair(item["source"], item["image"], item["mask"], h, w)
                pictures = dict(zip(("source", "image", "mask"), pictures))
            else:
                pictures = {"image": fit(item["image"], h, w)[0]}
            pictures = {k: torch.tensor(v) for k, v in pictures.items() if v is not None}
            return dict(i=i, size=size, shape=(h, w), record=told, **pictures)
        except BadFile as e:
            return dict(i=i, size=size, shape=(0, 0), record={"bad": str(e)})


def make_latents(cfg: Config, source, todo: dict[str, range], vae, dist) -> None:
    """Write the shards of `todo`. Batches are of one shard and one shape, so that neither a restart nor the
    number of ranks changes what is encoded together: what differs is rounding that the kernels may do."""
    order = [i for indices in todo.values() for i in indices]
    loader = iter(torch.utils.data.DataLoader(
        Pictures(cfg, source), batch_size=None, sampler=order, num_workers=cfg.workers,
        prefetch_factor=4 if cfg.workers else None, worker_init_fn=common.die_with_parent,
        collate_fn=dict, generator=torch.Generator()))
    bar = log.progress(len(order), 0, "latents", dist)
    bad = read = 0
    for name, indices in todo.items():
        rows, waiting = {}, {}
        for _ in indices:
            row = next(loader)
            rows[row["i"]] = row
            same = waiting.setdefault(row["shape"], [])
            if "bad" not in row["record"]:
                same.append(row)
            if len(same) == cfg.batch_size:
                encode(vae, waiting.pop(row["shape"]), source, dist.device)
        for same in waiting.values():
            encode(vae, same, source, dist.device)
        for problem in (row["record"].get("bad") for row in rows.values()):
            read += 1
            if problem:
                bad += 1
                print(f"skipped: {problem.removeprefix('error: ')}", file=sys.stderr)
                if too_many(bad, read, MAX_BAD):
                    raise SystemExit(f"{problem} (the last of {bad} bad files among {read} read, too many "
                                     f"to go on: repair {source.name})")
        write(Path(cfg.out) / name, latent_shard([rows[i] for i in indices]))
        bar.update(len(indices))
    bar.close()


@torch.no_grad()
def encode(vae, rows: list[dict], source, device) -> None:
    """Pictures of rows of one shape -> latents fp16 [C, h, w] in their place; masks to the latents' size."""
    if not rows:
        return
    for key in ("image", "source"):
        if key in rows[0]:
            images = torch.stack([row[key] for row in rows]).to(device).permute(0, 3, 1, 2).contiguous()
            for row, z in zip(rows, vae.encode(images.float().div_(127.5).sub_(1)).half().cpu()):
                row[key] = z
                if not torch.isfinite(z).all():
                    problem = BadFile(f"{source.name} item {row['i']}", "its latents are not finite",
                                      "look at it, and at the VAE's weights")
                    row["record"] = {"bad": str(problem)}
    for row in rows:
        if "mask" in row:
            row["mask"] = F.max_pool2d(row["mask"][None], vae.stride)[0].half()


def latent_shard(rows: list[dict]) -> dict[str, Tensor]:
    """HxW.image, .source [k, C, h, w] and .mask [k, h, w] of the k items of a bucket; of each item at [n, 3]
    = H, W and row there (0 for a bad one), size [n, 2], crc [n], and record, JSON that ends at `end`."""
    groups, at, sums, records = {}, [], [], []
    for row in rows:
        record, (h, w) = row["record"], row["shape"]
        parts = []
        if "bad" in record:
            h = w = place = 0
        else:
            record["mask"] = "mask" in row
            parts = [row[key] for key in ("image", "source", "mask") if key in row]
            group = groups.setdefault((h, w), {key: [] for key in ("image", "source", "mask")})
            place = len(group["image"])
            empty = torch.zeros(row["image"].shape[-2:], dtype=torch.float16)
            for key, kept in group.items():
                if key in row or key == "mask" and "source" in row:
                    kept.append(row.get(key, empty))
        records.append(json.dumps(record).encode())
        at.append((h, w, place))
        sums.append(latent_crc(row["i"], records[-1], at[-1], row["size"], *parts))
    out = {f"{h}x{w}.{key}": torch.stack(kept) for (h, w), group in groups.items()
           for key, kept in group.items() if kept}
    return out | {"at": torch.tensor(at, dtype=torch.int32), "crc": torch.tensor(sums),
                  "size": torch.tensor([row["size"] for row in rows], dtype=torch.int32),
                  "end": torch.tensor(np.cumsum([len(r) for r in records])),
                  "record": torch.frombuffer(bytearray(b"".join(records)), dtype=torch.uint8)}


####################################################################################################
# Files
####################################################################################################


def put(path: Path, save, end: str = ".tmp") -> None:
    """save(temporary path), fsync, rename; SystemExit with one line when the disk is full or failing."""
    tmp = path.with_name(path.name + end)
    try:
        save(tmp)
        tmp.chmod(0o644)  # safetensors makes it 0600
        checkpoint.fsync(tmp)
        tmp.rename(path)
        checkpoint.fsync(path.parent)
    except (OSError, SafetensorError) as e:  # safetensors reports a full disk as its own error
        tmp.unlink(missing_ok=True)
        raise SystemExit(f"error: {path}: cannot be written ({printable(str(e))[:120]}): free some space, "
                         "then the same command goes on") from None


def write_json(path: Path, value: dict, rank: int = 0) -> None:
    put(path, lambda tmp: tmp.write_text(json.dumps(value, indent=1)), f".{rank}.tmp")


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """A shard, then the file that says it is whole."""
    path.with_suffix(".json").unlink(missing_ok=True)  # of a damaged shard
    put(path, lambda tmp: save_file(tensors, tmp))
    write_json(path.with_suffix(".json"), {"bytes": path.stat().st_size, "sha256": checkpoint.sha256(path)})


def verified(path: Path) -> bool:
    """Whether a shard is there and every byte is as it was written; what is damaged is named."""
    try:
        told = json.loads(path.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return False
    try:
        if path.stat().st_size == told["bytes"] and checkpoint.sha256(path) == told["sha256"]:
            return True
    except (OSError, KeyError, TypeError):
        pass
    print(f"damaged: {path}: it is made anew", file=sys.stderr)
    path.with_suffix(".json").unlink(missing_ok=True)
    return False


def finish(out: Path, plan: dict, every: dict, captions: list[str], rank: int) -> None:
    """Once all shards are there, whoever finds them writes index.safetensors (keys of the texts, sizes of the
    items) and manifest.json. No rank waits for another: a collective would time out."""
    try:
        files = {name: json.loads((out / name).with_suffix(".json").read_bytes()) for name in every}
    except FileNotFoundError:
        return
    parts = [load_file(out / name) for name in every if name.startswith("latents")]
    index = {"keys": torch.tensor([key_of(c) for c in captions])}
    bad = 0
    if parts:
        index["sizes"] = torch.cat([p["size"] for p in parts])
        bad = sum(int((p["at"][:, 0] == 0).sum()) for p in parts)
    put(out / "index.safetensors", lambda tmp: save_file(index, tmp), f".{rank}.tmp")
    files["index.safetensors"] = {"bytes": (out / "index.safetensors").stat().st_size,
                                  "sha256": checkpoint.sha256(out / "index.safetensors")}
    write_json(out / "manifest.json", plan | {"bad": bad, "files": files}, rank)
    size = sum(f["bytes"] for f in files.values()) / 2**30
    print(f"{out}: {len(captions):,} texts, {plan['made']['items']:,} items, {bad:,} skipped, {size:.3f} GiB",
          flush=True)


if __name__ == "__main__":
    common.command(main, Config, __doc__, "the same command goes on")
