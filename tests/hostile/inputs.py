"""Hostile inputs, each with what reads it: cases(folder) yields (group, name, act).

`act()` must end in one of two ways: it returns (the input was harmless, and what it gave was checked), or it
raises SystemExit with one line that begins with "error: ". All else is wrong, as are more than LIMIT seconds.
"""

import contextlib
import io
import json
import os
import pickle
import struct
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

import checkpoint
import common
import evaluate
import make_cache
import make_prefs
import model
import sample
import train_omni
import train_pefl
import train_reward
from pretrained import __main__ as command
from pretrained.files import open_folder, open_safetensors, read_weights
from readers import files

LIMIT = 20  # seconds, on a slow machine that others use too
MEMORY = 2**30  # bytes by which an input may raise the peak of this process
SCRIPTS = {train_omni: {}, train_pefl: {}, train_reward: {"pairs": "p.json"}, evaluate: {"task": "scenes"},
           make_prefs: {}, make_cache: {"base": "b", "data": "scenes", "out": "o"},
           sample: {"task": "t2i", "ckpt": "c", "prompt": "a star"}}


class Accepted(Exception):
    """What had to be refused was not."""


def must_refuse(act, *args, **kwargs):
    act(*args, **kwargs)
    raise Accepted


def cases(folder):
    for group in (flags, commands, texts, environment, manifests, resumes, weights, pickles, parquets):
        yield from ((group.__name__, name, act) for name, act in group(Path(folder)))


#### flags ###################################################################################################
def flags(folder):
    """Every number of every script far beyond reason; every place empty or with a zero byte in it."""
    for script, own in SCRIPTS.items():
        cfg = script.Config(**own)
        yield f"{script.__name__} as it is", partial(script.check, cfg)
        for f in fields(cfg):
            kind = str(f.type)
            if isinstance(f.default, bool) or "Literal" in kind or "tuple" in kind:
                continue
            bad = []
            if kind in ("<class 'int'>", "int | None"):
                bad = [10**30, -10**30, 10**5000, 2**63]
            elif kind in ("<class 'float'>", "float | None"):
                bad = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300]
            elif f.name in common.NEEDED:
                bad = ["a\0b"] + [""] * (f.default != "")
            for value in bad:
                wrong = replace(cfg, **{f.name: value})
                shown = str(value)[:9] if not isinstance(value, int) or abs(value) < 10**99 else "10^5000"
                yield f"{script.__name__} --{f.name} {shown!r}", partial(must_refuse, script.check, wrong)
    for script, name, value in (
            (train_omni, "checkpointing", -1), (train_pefl, "checkpointing", -1), (train_pefl, "lora", -1),
            (train_omni, "batch_size", 0), (train_omni, "batch_size", 10**9), (train_pefl, "eta", -1.0),
            (train_omni, "image_size", 10**9), (train_omni, "workers", 10**6), (train_omni, "ema", 1.0),
            (train_omni, "lr", 1e8), (train_pefl, "phases", ""), (train_pefl, "phases", "9" * 5000),
            (train_pefl, "phases", f"20/15/10x{'9' * 5000}"), (train_pefl, "phases", "3/2/1x1," * 2000),
            (sample, "height", 10**9), (sample, "num_samples", 10**9), (sample, "steps", 10**9 + 1),
            (sample, "guidance", 1e9), (sample, "seam", -1), (evaluate, "rows", 10**8),
            (make_cache, "shard", 0), (make_cache, "t5_length", 10**8), (make_prefs, "k", 10**8),
            (train_reward, "augment", 10**8), (train_pefl, "disc_first", 10**12),
            (train_pefl, "disc_updates", 0),
            *((train_pefl, "tasks", text) for text in (
                "", "t2i", "t2i=", "t2i=-1", "t2i=nan", "t2i=1e99", "paint=1", "t2i=1,t2i=1", "erase=0",
                "," * 5000, "\u0661=1")),
            *((train_omni, "tasks", text) for text in ("", "balanced", "remove=1", "t2i=inf", "t2i=1;2"))):
        cfg = replace(script.Config(**SCRIPTS[script]), **{name: value})
        yield f"{script.__name__} --{name} {str(value)[:12]}", partial(must_refuse, script.check, cfg)


def commands(folder):
    """Command lines: one line and no box, with the nearest flag where there is one."""
    def parsed(script, *words, near=""):
        before, sys.argv = sys.argv, ["x.py", *words]
        try:
            common.parse(script.Config, config=())
        except SystemExit as e:
            if near and f"use --{near}," not in str(e):
                raise AssertionError(f"no --{near}: {e}") from None
            raise
        finally:
            sys.argv = before

    for words, near in ((("--stepz", "3"), "steps"), (("--batchsize", "3"), "batch_size"),
                        (("--lrr", "1"), "lr"), (("--imagesize=3",), "image_size"),
                        (("--" + "x" * 5000,), ""), (("--steps", "x"), ""),
                        (("--steps",), ""), (("--stage", "none"), ""), (("--lr", "1e"), ""), (("extra",), ""),
                        (("--steps", "9" * 5000), ""), (("--aspects", "perhaps"), ""), (("--\u202e",), "")):
        yield " ".join(words)[:40], partial(must_refuse, parsed, train_omni, *words, near=near)
    yield "the right flags", partial(parsed, train_omni, "--steps", "3", "--batch-size=2", "--ckpt", "a")


def texts(folder):
    """Numbers with commas, phases."""
    for text in ("", ",", "x", "1,,2", "9" * 5000, "1," * 5000 + "1", "-1", "1e3", "0",
                 "\u0661", "1;2", "nan"):
        yield f"numbers {text[:12]!r}", partial(must_refuse, common.numbers, text, "steps", 1)
    yield "numbers 20,8", partial(common.numbers, "20,8", "steps", 1)
    for text in ("", "/", "20/15/10", "20/15/10x0", "1/1/1x1", "2/3/1x1", "20/15/0x5", "-1/2/1x1",
                 "1.5/1/1x2", "99999/2/1x1", "20/15/10x2000;8/6/3", "20/15/10xinf", "3/2/1x" + "9" * 10):
        yield f"phases {text[:20]!r}", partial(must_refuse, train_pefl.parse_phases, text)
    yield "phases of the paper", partial(train_pefl.parse_phases, train_pefl.Config.phases)


def environment(folder):
    """What torchrun sets, set by hand."""
    def asked(env):
        before = {k: os.environ.pop(k, None) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR",
                                                       "MASTER_PORT")}
        os.environ.update(env)
        try:
            common.ranks()
        finally:
            for k, v in before.items():
                os.environ.pop(k, None)
                os.environ.update({k: v} if v is not None else {})

    at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for bad in ("x", "", "-1", "1.0", "1e3", "9" * 30, "\u0663", " 2", "nan"):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            yield f"{name}={bad!r}", partial(must_refuse, asked, {"WORLD_SIZE": "2", **at, name: bad})
    for env in ({"WORLD_SIZE": "0"}, {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "2", **at},
                {"WORLD_SIZE": "2", "RANK": "1"}, {"WORLD_SIZE": "2", "MASTER_ADDR": "a"},
                {"WORLD_SIZE": "2", "LOCAL_RANK": "5", **at}):
        yield str(env), partial(must_refuse, asked, env)
    yield "torchrun's own", partial(asked, {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", **at})
    yield "none", partial(asked, {})


#### manifests ###############################################################################################
BAD = (None, "y", "", -1, 0, 10**12, 10**30, 1.5, float("nan"), float("inf"), True, [], {}, [[]], "a\0b",
       {"a": {"b": 1}}, "9" * 5000)


def signed(folder, manifest):
    """Write a manifest with a hash that is right: whoever writes a file can write a hash."""
    manifest.pop("sha256", None)
    manifest["sha256"] = checkpoint._manifest_hash(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def manifests(folder):
    torch.manual_seed(0)
    net = model.Editor(model.inpainting(model.PRESETS["test"]))
    meta = {"arch": net.arch, "config": {"image_size": 32, "shift": 1.0}, "samples": 4, "precision": "fp32",
            "run_id": "abc", "stack": {}}
    ok = checkpoint.write(folder / "manifest", 3, {"model": net.state_dict()}, meta)
    whole = (ok / "manifest.json").read_text()
    torch.save(net.arch, folder / "arch.pt")

    def opened(write):
        """Load it, build the network and fill it: what is accepted must work."""
        file = ok / "manifest.json"
        file.unlink(missing_ok=True)
        write(file)
        try:
            tensors, m = checkpoint.load(ok)
            built = model.build_editor(m.get("arch", {}), "it")
            checkpoint.load_state(built, tensors["model"], "it")
        finally:
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
            file.write_text(whole)

    def changed(path, value):
        def write(file):
            m = json.loads(whole)
            at = m
            for key in path[:-1]:
                at = at[key]
            if value is KeyError:
                at.pop(path[-1], None)
            else:
                at[path[-1]] = value
            signed(file.parent, m)
        return partial(opened, write)

    yield "whole", partial(opened, lambda f: f.write_text(whole))
    for key in ("format", "step", "samples", "world", "files", "meta", "arch", "config", "git", "torch",
                "time", "precision"):
        for value in BAD:
            yield f"{key} {str(value)[:12]!r}", changed((key,), value)
        yield f"without {key}", changed((key,), KeyError)
    yield "format 2", partial(must_refuse, changed(("format",), 2))
    for name in fields(net.cfg):
        for value in (None, "y", -1, 10**9, 10**12, 1.5, float("nan"), [], {}):
            yield f"arch {name.name} {value!r}", changed(("arch", name.name), value)
        yield f"arch without {name.name}", changed(("arch", name.name), KeyError)
    for name in ("depth", "heads", "head_dim", "pos_max", "txt_dim", "vec_dim", "patch", "channels"):
        for value in (10**12, 10**9, 0, -1, 2**20):
            yield f"arch {name} {value}", partial(must_refuse, changed(("arch", name), value))
    yield "predict y", partial(must_refuse, changed(("arch", "predict"), "y"))
    for path, value in ((("config", "image_size"), 10**9), (("config", "image_size"), "y"),
                        (("config", "shift"), "y"), (("config", "shift"), 0),
                        (("config", "shift"), float("nan")),
                        (("meta", "stack"), []), (("meta", "stack", "sd3"), 3),
                        (("meta", "stack", "sd3"), "a\0b"), (("meta", "stack", "tokenizers"), "x" * 10**5),
                        (("meta", "stack", "t5_length"), 10**9), (("meta", "run_id"), "../../x"),
                        (("meta", "val"), [1]),
                        (("meta", "statistics"), float("nan")), (("meta", "shared"), {"path": "."}),
                        (("meta", "shared"), {"path": ".", "prefix": "", "sha256": "0"}),
                        (("meta", "shared"), {"path": "/dev/zero", "prefix": "", "sha256": "0"}),
                        (("meta", "shared"), {"path": "a\0b", "prefix": "", "sha256": "0"}),
                        (("meta", "shared"), {"path": ".", "prefix": "", "sha256": "0", "more": 1}),
                        (("files",), {"../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
                        (("files",), {"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
                        (("files", "model.safetensors"), {"bytes": 10**18, "sha256": "0" * 64}),
                        (("files", "model.safetensors"), {"bytes": 1}), (("files", "model.safetensors"), 3)):
        yield f"{'.'.join(path)} {str(value)[:40]}", partial(must_refuse, changed(path, value))
    raw = {"empty": b"", "no JSON": b"\x00\xff", "a list": b"[1]", "a number": b"1", "nested": b"[" * 100_000,
           "nested tables": b'{"a":' * 100_000, "long number": b'{"format": ' + b"9" * 10_000 + b"}",
           "infinite": b'{"format": 1e999}', "NaN": b'{"format": NaN}', "a BOM": b"\xef\xbb\xbf{}",
           "two": b"{}{}", "half": whole.encode()[:len(whole) // 2], "a lone surrogate": b'{"a": "\\ud800"}',
           "its hash is another": whole.replace('"step": 3', '"step": 4').encode()}
    for name, content in raw.items():
        yield name, partial(must_refuse, opened, lambda f, c=content: f.write_bytes(c))

    def sparse(file):
        with open(file, "wb") as f:
            f.truncate(2**40)

    yield "a terabyte", partial(must_refuse, opened, sparse)
    yield "a FIFO", partial(must_refuse, opened, lambda f: os.mkfifo(f))
    yield "a folder", partial(must_refuse, opened, lambda f: f.mkdir())
    for target in ("/dev/zero", "/dev/tty", "/nowhere", "manifest.json", "/proc/self/mem"):
        yield f"a link to {target}", partial(must_refuse, opened, lambda f, t=target: f.symlink_to(t))


def resumes(folder):
    """Checkpoints of another dtype or without their optimiser's state."""
    net = torch.nn.Linear(3, 3)
    opt = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.ones(1, 3)).sum().backward()
    opt.step()
    state = {"model": net, "optimizer": opt}

    def resumed(name, change, file="model"):
        tensors = {k: dict(v) for k, v in checkpoint.tensors_of(state).items()}
        tensors[file] = change(tensors[file])
        out = folder / f"resume_{name.replace(' ', '_')}"
        checkpoint.write(out / "step_00000001", 1, tensors, {"config": {}})
        checkpoint.resume(out, state)

    yield "as saved", partial(resumed, "as saved", lambda t: t)
    for name, file, change in (
            ("bf16 weights", "model", lambda t: {k: v.bfloat16() for k, v in t.items()}),
            ("fp64 weights", "model", lambda t: {k: v.double() for k, v in t.items()}),
            ("whole numbers", "model", lambda t: {k: v.int() for k, v in t.items()}),
            ("a weight less", "model", lambda t: {"weight": t["weight"]}),
            ("a weight more", "model", lambda t: t | {"more": t["bias"]}),
            ("another shape", "model", lambda t: t | {"bias": torch.zeros(4)}),
            ("bf16 moments", "optimizer", lambda t: {k: v.bfloat16() for k, v in t.items()}),
            ("no second moment", "optimizer", lambda t: {k: v for k, v in t.items() if "avg_sq" not in k}),
            ("no step", "optimizer", lambda t: {k: v for k, v in t.items() if ".step" not in k}),
            ("moments of others", "optimizer", lambda t: {f"x{k}": v for k, v in t.items()}),
            ("moments of another shape", "optimizer", lambda t: {k: v.new_zeros(7) for k, v in t.items()})):
        yield name, partial(must_refuse, resumed, name, change, file)


#### weights #################################################################################################
def safetensors(table, body=b"", length=None):
    raw = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + body


def weights(folder):
    good = folder / "good.safetensors"
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5)}, good)
    whole = good.read_bytes()

    def read(content, name="w.safetensors", check=False):
        path = folder / name
        path.unlink(missing_ok=True)
        content(path) if callable(content) else path.write_bytes(content)
        try:
            stored = open_safetensors(path)
            got = {k: stored.read(k) for k in stored.headers}
            command.show(str(path)) if check else None
            assert all(v.numel() < 10**6 for v in got.values())
        finally:
            path.unlink(missing_ok=True)

    def quiet(*args, **kwargs):
        with contextlib.redirect_stdout(io.StringIO()):
            read(*args, **kwargs)

    yield "good", partial(quiet, whole, check=True)
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for name, change in {
            "shape 2^63": {"shape": [2**63]}, "shape 2^64": {"shape": [2**64, 2]},
            "shape -1": {"shape": [-1]}, "shape 1.5": {"shape": [1.5]},
            "shape 2^31 twice": {"shape": [2**31, 2**31]}, "shape text": {"shape": "y"},
            "0 times 2^62": {"shape": [0, 2**62, 4], "data_offsets": [0, 0]}, "dtype none": {"dtype": "Q4"},
            "dtype list": {"dtype": []}, "offset back": {"data_offsets": [8, 0]}, "offset far":
            {"data_offsets": [0, 2**60]}, "offset text": {"data_offsets": "0:8"}, "no shape": {"shape": None},
            "a thousand axes": {"shape": [1] * 1000}}.items():
        yield name, partial(quiet, safetensors({"a": entry | change}, b"\0" * 8))
    for name, raw in {"empty": b"", "7 bytes": b"1234567", "length 2^60": safetensors({}, length=2**60),
                      "length 2^63": safetensors({}, length=2**63), "no JSON": safetensors(b"\xff" * 20),
                      "nested": safetensors(b"[" * 100_000), "nested tables": safetensors(b'{"a":' * 100_000),
                      "overlap": safetensors({"a": entry, "b": entry}, b"\0" * 8),
                      "a list": safetensors(b"[1]"),
                      "no body": safetensors({"a": entry}), "long body": safetensors({"a": entry}, b"\0" * 99)
                      }.items():
        yield name, partial(must_refuse, quiet, raw)
    for cut in range(0, len(whole), 7):
        yield f"cut at {cut}", partial(must_refuse, quiet, whole[:cut])
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(0, len(whole) - 68, 60), rng.integers(0, 8, 60)):
        raw = bytearray(whole)
        raw[at] ^= 1 << bit
        yield f"bit {bit} of byte {at}", partial(quiet, bytes(raw))
    twice = safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(entry).encode(),) * 2), b"\0" * 8)
    yield "twice", partial(quiet, twice)  # safetensors takes the last one
    yield "a FIFO", partial(must_refuse, quiet, lambda p: os.mkfifo(p))
    yield "/dev/zero", partial(must_refuse, quiet, lambda p: p.symlink_to("/dev/zero"))
    yield "a link to itself", partial(must_refuse, quiet, lambda p: p.symlink_to(p))

    def shards(index):
        at = folder / "shards"
        at.mkdir(exist_ok=True)
        (at / "s.safetensors").write_bytes(whole)
        (at / "m.safetensors.index.json").write_bytes(index if isinstance(index, bytes) else
                                                      json.dumps(index).encode())
        open_folder(at, "m")

    yield "index", partial(shards, {"weight_map": {"a": "s.safetensors", "b": "s.safetensors"}})
    for name, index in {"nested": b"[" * 100_000, "nested tables": b'{"weight_map":' * 100_000, "list": [1],
                        "no map": {}, "map is a list": {"weight_map": []}, "empty": b"", "NaN": b"NaN",
                        "map of numbers": {"weight_map": {"a": 3}},
                        "elsewhere": {"weight_map": {"a": "../good.safetensors"}},
                        "absent": {"weight_map": {"a": "t.safetensors"}}, "a name less":
                        {"weight_map": {"a": "s.safetensors"}},
                        "digits": b'{"weight_map": ' + b"9" * 9000 + b"}",
                        "absolute": {"weight_map": {"a": "/dev/zero"}}}.items():
        yield f"index: {name}", partial(must_refuse, shards, index)


class Evil:
    def __reduce__(self):
        return os.system, ("touch owned",)


def pickles(folder):
    def convert(content):
        path = folder / "w.pt"
        path.unlink(missing_ok=True)
        content(path) if type(content) is type(convert) else torch.save(content, path)
        try:
            command.convert(str(path), str(folder / "out.safetensors"))
            assert not Path("owned").exists()
        finally:
            path.unlink(missing_ok=True)

    one = torch.ones(1)
    yield "good", partial(convert, {"state_dict": {"module.a": one}})
    yield "tied", partial(convert, {"a": one, "b": one})
    for name, content in {
            "stride 0, 4 TB": {"a": one.as_strided((2**20, 2**20), (0, 0))}, "stride 0, 16 MB":
            {"a": one.expand(2000, 2000)}, "sparse": {"a": torch.eye(3).to_sparse()}, "code": {"a": Evil()},
            "a list": [one], "a tensor": one, "numbers": {"a": 3}, "empty": {}, "names are numbers": {3: one},
            "twice": {"a": one, "module.a": one}, "a module": torch.nn.Linear(2, 2), "none": None,
            "a table in a table": {"model": {"model": {"model": {}}}}}.items():
        yield name, partial(must_refuse, convert, content)
    for name, raw in {"empty file": b"", "text": b"hello", "a pickle": pickle.dumps(Evil()),
                      "zip header": b"PK\3\4", "pickle bomb": b"\x80\x02" + b"(" * 10**5,
                      "long name": b"\x80\x02X\xff\xff\xff\x7f"}.items():
        yield name, partial(must_refuse, convert, lambda p, raw=raw: p.write_bytes(raw))
    yield "a FIFO", partial(must_refuse, convert, lambda p: os.mkfifo(p))
    yield "/dev/zero", partial(must_refuse, convert, lambda p: p.symlink_to("/dev/zero"))
    yield "nowhere", partial(must_refuse, read_weights, str(folder / "nowhere.pt"))
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(100.0)}, buffer)
    whole = buffer.getvalue()
    for cut in range(1, len(whole), 61):
        yield f"cut at {cut}", partial(must_refuse, convert, lambda p, c=cut: p.write_bytes(whole[:c]))


def parquets(folder):
    """A bound of 4 MB in place of the 256, to be quick."""
    path = folder / "p.parquet"

    def read(table=None, raw=None, **settings):
        before, files.CACHE_BYTES = files.CACHE_BYTES, 4 << 20
        path.write_bytes(raw) if raw is not None else pq.write_table(table, path, **settings)
        most = pa.default_memory_pool().bytes_allocated()
        try:
            rows = files.RowGroups([path], lambda file, kinds: ("image", "caption"))
            count = sum(1 for _ in rows.light(lambda names: ("caption",)))
            assert count == rows.first[-1]
            for n in range(0, count, max(1, count // 7)):
                rows.row(n)
            most = pa.default_memory_pool().bytes_allocated() - most
            assert most < 64 << 20, f"{most:,} bytes"
        finally:
            files.CACHE_BYTES = before

    def table(n, image=b"\x89PNG", caption="a star"):
        return pa.table({"image": [image] * n, "caption": [caption] * n})

    yield "good", partial(read, table(100))
    yield "several groups", partial(read, table(100), row_group_size=7)
    for name, bad in {"captions of 100 kB, 1000 times": table(1000, caption="x" * 100_000),
                      "pictures of 100 kB, 1000 times": table(1000, image=b"x" * 100_000)}.items():
        yield name, partial(must_refuse, read, bad)
    yield "no columns", partial(must_refuse, read, pa.table({"x": [1]}))
    kinds = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    yield "no rows", partial(read, table(0).cast(kinds))
    pq.write_table(table(50), path)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 31):
        yield f"cut at {cut}", partial(must_refuse, read, raw=whole[:cut])
    for name, raw in {"empty": b"", "PAR1": b"PAR1PAR1",
                      "footer 2^31": b"PAR1" + b"\0" * 9 + b"\xff\xff\xff\x7fPAR1",
                      "text": b"hello" * 100}.items():
        yield name, partial(must_refuse, read, raw=raw)
