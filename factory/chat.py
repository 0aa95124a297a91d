"""Scored pairs as conversations, to fine-tune a vision-language model into a judge (OmniEdit Sec. 3.3).

One JSON line each, in the form that ms-swift and LLaMA-Factory read: {"messages": [{"role", "content"}],
"images": [names below the file's folder]}, with <image> in the text where a picture stands. The questions are
word for word those of readers/served.py, so a model that learned from them answers as its judge. Instructions
are fenced there, and hold no "<": none can put a picture into the text.
"""

import hashlib
import json

from factory import shards
from readers import served


def conversation(parts: list, answer: dict, pictures: list[str]) -> dict:
    """parts of a question: texts and numbers of pictures -> a line."""
    text = "\n".join("<image>" if isinstance(part, int) else part for part in parts)
    return {"messages": [{"role": "user", "content": text},
                         {"role": "assistant", "content": json.dumps(answer, ensure_ascii=False)}],
            "images": [pictures[part] for part in parts if isinstance(part, int)]}


def conversations(row: dict) -> tuple[list[dict], dict[str, bytes]]:
    """A scored row -> its two conversations (semantic consistency, perceptual quality) and the pictures that
    they show, by names of their content; nothing of a row without scores."""
    if row["o_score"] is None:
        return [], {}
    cells = [row[k]["bytes"] for k in ("src_img", "edited_img")]
    names = [f"pictures/{hashlib.sha256(b).hexdigest()[:24]}" + (".png" if b[:4] == b"\x89PNG" else ".jpg")
             for b in cells]

    def said(kind, why, score):
        mark = hashlib.sha256(f"{row['omni_edit_id']} {kind}".encode()).hexdigest()[:8]
        return mark, {"id": mark, "reasoning": why or "", "score": score}

    out = []
    if row["sc_score_1"] is not None:  # a distilled scorer has but the overall score
        mark, answer = said("sc", row["sc_reasoning"], [row["sc_score_1"], row["sc_score_2"]])
        out.append(conversation(served.ask_sc(row["edited_prompt_list"][0])(mark), answer, names))
    if row["pq_score"] is not None:
        mark, answer = said("pq", row["pq_reasoning"], row["pq_score"])
        out.append(conversation(served.ask_pq(mark), answer, names[1:]))
    return out, dict(zip(names, cells)) if out else {}


def write(folder, out) -> tuple[int, int]:
    """The finished shards of a score folder -> OUT/chat.jsonl and OUT/pictures; conversations, rows without
    scores. A picture that is there already is not written again."""
    lines, skipped = [], 0
    for place in (out, out / "pictures"):
        shards.sweep(place)
    for s in range(shards.read_plan(folder, ("score",))["shards"]):
        for row in shards.read(folder / shards.name_of(s)):
            made, pictures = conversations(row)
            skipped += not made
            lines += made
            for name, data in pictures.items():
                if not (out / name).is_file():
                    shards.put(out / name, data)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    shards.put(out / "chat.jsonl", text.encode())
    return len(lines), skipped
