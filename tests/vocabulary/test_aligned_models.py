"""Real transformers models with tokenizers of their own, tied and untied: the merged folder loads, every token has its
row in the loaded model, and the model generates with the merged tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vocabulary_folders import EMBED, HEAD, Sources, folder_options, three_tokenizers, tokenizers

import paramdelta

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def saved(root: Path, *, tied: bool) -> Sources:
    """Save three models, each with its tokenizer, vocabularies padded to multiples."""
    made = Sources(three_tokenizers(), {})
    torch.manual_seed(3)
    for role, pad in (("post", 64), ("base", 1), ("new_base", 8)):
        ids = made.ids(role)
        rows = -(-(max(ids.values()) + 1) // pad) * pad
        config = transformers.LlamaConfig(
            **SIZES,
            vocab_size=rows,
            tie_word_embeddings=tied,
            bos_token_id=ids["<s>"],
            eos_token_id=ids["</s>"],
            pad_token_id=ids.get("<|both|>"),
        )
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(root / role)
        own = tokenizers.Tokenizer.from_str(json.dumps(made.tokenizers[role]))
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<|both|>" if "<|both|>" in ids else None
        )
        fast.save_pretrained(root / role)
        made.folders[role] = root / role
        made.tensors[role] = {name: array(p) for name, p in model.state_dict().items()}
        assert (HEAD in names_in(root / role)) == (not tied)
    return made


def names_in(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="np") as file:
        return set(file.keys())


def array(tensor: Any) -> np.ndarray[Any, Any]:
    import ml_dtypes

    return np.asarray(tensor.detach().view(torch.int16).numpy().view(ml_dtypes.bfloat16))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("role", ["post", "new_base"])
def test_the_loaded_model_has_each_row(tmp_path: Path, role: str, tied: bool) -> None:
    made, out = saved(tmp_path, tied=tied), tmp_path / "out"
    report = paramdelta.merge(
        **folder_options(made), out=out, vocab="align", tokenizer=role.replace("_", "-"), threads=1
    )
    assert paramdelta.verify(out, **folder_options(made), everything=True).problems == ()
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    vocabulary = loaded.get_vocab()
    assert vocabulary == made.ids(role)
    tables = {EMBED: model.get_input_embeddings().weight, HEAD: model.get_output_embeddings().weight}
    for name, table in tables.items():
        rows = array(table)
        source = EMBED if tied else name
        for text, number in vocabulary.items():
            assert rows[number].tobytes() == made.expected(source, text).tobytes(), text
    assert model.config.vocab_size == len(made.tensors[role][EMBED]) == len(array(tables[EMBED]))
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (vocabulary["<s>"], vocabulary["</s>"])
    assert model.config.pad_token_id == vocabulary["<|both|>"]
    changed = report.policies["vocabulary"]["token_ids"]
    assert ("config.json" in changed) == (role == "post")
    assert ("generation_config.json" in changed) == (role == "new_base")
    ids = loaded("the quick brown fox", return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert text.shape[1] > ids.shape[1]
