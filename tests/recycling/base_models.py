"""Makes three versions of a tiny Llama in the folder named on the command line: v1, and each next one a step away."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers


def main(root: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name in ("v1", "v2", "v3"):
        model.save_pretrained(root / name, max_shard_size="40KB")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.01)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
