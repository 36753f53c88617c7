"""``paramdelta.stream`` feeding a ``load_weights(iterator)`` such as those of vLLM's models.

The loader here is small and its own, and follows that interface: fused parameters (qkv, gate and up) that know how to
take their parts by shard id, parameters sharded among ranks, names that are skipped or renamed, and a set of what was
loaded for an answer. vLLM itself is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

import paramdelta

torch = pytest.importorskip("torch", reason="the models of this test are made by torch")
transformers = pytest.importorskip("transformers", reason="the models of this test are made by transformers")

from test_models import FAMILIES, SIZES, make_models, tensors_of  # noqa: E402

HIDDEN, MIDDLE, VOCAB = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
HEADS, KV_HEADS = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
HEAD = HIDDEN // HEADS
STACKED = [  # the fused parameter, the part of it in a checkpoint, which part it is
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]


class Engine:
    """The parameters of a Llama as one rank of an inference engine holds them, with tensor parallelism."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks
        self.parameters: dict[str, Any] = {}
        self.loaders: dict[str, Callable[..., None]] = {}
        for layer in range(SIZES["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            rows = (HEADS + 2 * KV_HEADS) * HEAD // ranks
            self._add(f"{at}self_attn.qkv_proj.weight", (rows, HIDDEN), self._load_qkv)
            self._add(f"{at}self_attn.o_proj.weight", (HIDDEN, HIDDEN // ranks), self._load_columns)
            self._add(f"{at}mlp.gate_up_proj.weight", (2 * MIDDLE // ranks, HIDDEN), self._load_gate_up)
            self._add(f"{at}mlp.down_proj.weight", (HIDDEN, MIDDLE // ranks), self._load_columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self._add(f"{at}{norm}.weight", (HIDDEN,), self._load_whole)
        self._add("model.norm.weight", (HIDDEN,), self._load_whole)
        self._add("model.embed_tokens.weight", (VOCAB // ranks, HIDDEN), self._load_rows)
        self._add("lm_head.weight", (VOCAB // ranks, HIDDEN), self._load_rows)

    def load_weights(self, weights: Iterable[tuple[str, Any]]) -> set[str]:
        """Load each tensor as it comes; return the names of the parameters that were loaded."""
        loaded = set()
        for name, weight in weights:
            if "rotary_emb.inv_freq" in name:
                continue
            for fused, part, shard in STACKED:
                if f".{part}." in name:
                    target = name.replace(part, fused)
                    self.loaders[target](self.parameters[target], weight, shard)
                    break
            else:
                target = name
                self.loaders[target](self.parameters[target], weight)
            loaded.add(target)
        return loaded

    def _add(self, name: str, shape: tuple[int, ...], loader: Callable[..., None]) -> None:
        self.parameters[name] = torch.full(shape, torch.nan, dtype=torch.bfloat16)
        self.loaders[name] = loader

    def _shard(self, weight: Any, dim: int) -> Any:
        return weight.chunk(self.ranks, dim)[self.rank]

    def _load_whole(self, parameter: Any, weight: Any) -> None:
        parameter.copy_(weight)

    def _load_rows(self, parameter: Any, weight: Any) -> None:
        parameter.copy_(self._shard(weight, 0))

    def _load_columns(self, parameter: Any, weight: Any) -> None:
        parameter.copy_(self._shard(weight, 1))

    def _load_qkv(self, parameter: Any, weight: Any, shard: str) -> None:
        q, kv = HEADS * HEAD // self.ranks, KV_HEADS * HEAD // self.ranks
        start, size = {"q": (0, q), "k": (q, kv), "v": (q + kv, kv)}[shard]
        parameter.narrow(0, start, size).copy_(self._shard(weight, 0))

    def _load_gate_up(self, parameter: Any, weight: Any, shard: int) -> None:
        size = MIDDLE // self.ranks
        parameter.narrow(0, shard * size, size).copy_(self._shard(weight, 0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("models")
    make_models(FAMILIES["llama-untied"], where)
    return {role: where / role for role in ("post", "base", "new_base")}


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_the_engine_holds_the_merge(rank: int, ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    """As from the merged folder, tensor by tensor, whatever the batches in which they come."""
    engine = Engine(rank, ranks)
    loaded = engine.load_weights(paramdelta.stream(**folders, alpha=0.7, framework="pt", batch_bytes=4096))
    assert loaded == set(engine.parameters)

    paramdelta.merge(**folders, out=tmp_path / "out", alpha=0.7)
    from_folder = Engine(rank, ranks)
    from_folder.load_weights(tensors_of(tmp_path / "out").items())
    for name, parameter in engine.parameters.items():
        assert not parameter.isnan().any(), name
        assert torch.equal(parameter.view(torch.int16), from_folder.parameters[name].view(torch.int16)), name


def test_fused_parameters_are_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """The loader is not alone with its opinion: its fused rows are the parts of transformers' model, in order."""
    engine = Engine(0, 1)
    engine.load_weights(paramdelta.stream(**folders, framework="pt"))
    paramdelta.merge(**folders, out=tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    at = "model.layers.1."
    attention = torch.cat([model[f"{at}self_attn.{part}_proj.weight"] for part in "qkv"])
    middle = torch.cat([model[f"{at}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(engine.parameters[f"{at}self_attn.qkv_proj.weight"], attention)
    assert torch.equal(engine.parameters[f"{at}mlp.gate_up_proj.weight"], middle)
