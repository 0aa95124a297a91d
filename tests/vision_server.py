"""A real OpenAI-compatible server (`transformers serve`) of a vision-language model of random weights.

    python tests/vision_server.py FOLDER PORT [MORE FLAGS OF TRANSFORMERS SERVE]

The model, LLaVA's architecture with 64 channels, its processor and a tokenizer of bytes are made in FOLDER.
Each of 13 tokens ends a reply, so that a sampled one stops after some twenty, or is cut.
"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE = ("{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>"
            "{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: ")


def make(folder):
    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({t: i for i, t in enumerate(SPECIAL + letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>",
                                    eos_token="</s>", additional_special_tokens=["<image>"])
    look = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(look, words, 14, "default", TEMPLATE, num_additional_image_tokens=1)
    size = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    net = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **size),
        text_config=LlamaConfig(vocab_size=len(words), max_position_embeddings=8192, bos_token_id=1,
                                eos_token_id=2, pad_token_id=0, **size),
        image_token_index=3, vision_feature_layer=-1))
    net.generation_config.update(do_sample=True, pad_token_id=0, eos_token_id=[2, *range(4, 16)])
    net.save_pretrained(folder)
    processor.save_pretrained(folder)


if __name__ == "__main__":
    from transformers.cli.transformers import main

    folder, port, *more = sys.argv[1:]
    make(folder)
    sys.argv = ["transformers", "serve", folder, "--device", "cpu", "--host", "127.0.0.1", "--port", port]
    sys.argv += more
    main()
