"""Public weights on the command line.

    python -m pretrained show sd3_medium.safetensors          # or a folder: what it holds, by its headers
    python -m pretrained convert ImageReward.pt ImageReward.safetensors
    python -m pretrained export out/run DIFFUSERS_FOLDER        # our Editor -> diffusers' transformer/
"""

import sys
from pathlib import Path

from safetensors import SafetensorError

import checkpoint
from model import PRESETS, EditorConfig, config_from
from pretrained.files import (
    PARTS,
    by_first_name,
    describe,
    first_line,
    open_part,
    open_safetensors,
    read_weights,
    write,
)
from pretrained.sd3 import editor_config, export_diffusers


def show(path: str) -> None:
    """Print what a public file or folder holds, from its headers."""
    single, prefixes = Path(path).suffix == ".safetensors", tuple(p.prefix for p in PARTS.values())
    headers = open_safetensors(path).headers if single else {}
    parts = {}
    if Path(path).is_dir() or any(k.startswith(prefixes) for k in headers):
        parts = {name: open_part(path, name) for name in PARTS}
        parts = {name: (stored.headers, config) for name, (stored, config) in parts.items() if stored.headers}
    if not parts:
        for name, part in sorted(by_first_name(headers or read_weights(path)).items()):
            print(f"{name:<24} {describe(part)}")
    for name, (part, config) in parts.items():
        print(f"{name:<7} {describe(part)}")
        if name == "mmdit":
            cfg = editor_config(part, config, path)
            known = [k for k, v in PRESETS.items() if v == cfg]
            print(f"        {known[0] if known else 'of another size'}: {cfg.depth} blocks, {cfg.heads} "
                  f"heads of {cfg.head_dim}, patch {cfg.patch}, channels {cfg.in_channels} in, "
                  f"{cfg.channels} out, positions {cfg.pos_max}x{cfg.pos_max}, text {cfg.txt_dim}, "
                  f"vector {cfg.vec_dim}, QK norm {'yes' if cfg.qk_norm else 'no'}, {cfg.dual} dual blocks")


def convert(source: str, target: str) -> None:
    """A pickled table of tensors -> safetensors, names as `read_weights` gives them."""
    if Path(target).suffix != ".safetensors":
        raise SystemExit(f"error: {target}: the result is a .safetensors file: name it so")
    weights, tmp = read_weights(source), Path(target + ".tmp")
    try:
        write(weights, tmp)
        tmp.rename(target)
    except (OSError, SafetensorError) as e:
        tmp.unlink(missing_ok=True)
        raise SystemExit(f"error: {target}: cannot be written ({first_line(e)}): free some space, or name "
                         "another file") from None


def export(run: str, out: str) -> None:
    """One of our checkpoints of an Editor, the averaged weights first -> OUT/transformer/ (diffusers)."""
    tensors, manifest = checkpoint.load(run, ("ema", "model"))
    cfg = config_from(EditorConfig, manifest.get("arch", {}), "editor", run)
    weights = tensors.get("ema") or tensors["model"]
    state = {k.removeprefix("mmdit."): v for k, v in weights.items() if k.startswith("mmdit.")}
    folder = export_diffusers(cfg, state, out)
    print(f"{folder}: {describe(state)}")


COMMANDS = {"show": (show, "PATH"), "convert": (convert, "IN.pt OUT.safetensors"),
            "export": (export, "CHECKPOINT OUT")}

if __name__ == "__main__":
    command, arguments = COMMANDS.get(sys.argv[1] if len(sys.argv) > 1 else "", (None, ""))
    usage = "usage: " + "\n       ".join(
        f"python -m pretrained {name} {words}" for name, (_, words) in COMMANDS.items())
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(usage)
    elif command is None or len(sys.argv) - 2 != len(arguments.split()):
        raise SystemExit(usage)
    else:
        try:
            command(*sys.argv[2:])
        except BrokenPipeError:  # python -m pretrained show FILE | head
            sys.stdout = None
