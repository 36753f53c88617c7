"""The synthetic checkpoints: transformers loads them, a seed fixes their bytes, they differ as real ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from paramdelta.demo import shape_for, write_demo
from paramdelta.errors import InputError

ROLES = ("post", "base", "new_base")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    paths = write_demo(tmp_path_factory.mktemp("demo"), size="tiny")
    return dict(zip(ROLES, paths, strict=True))


def read(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("role", ROLES)
def test_transformers_loads_and_generates(folders: dict[str, Path], role: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folders[role], dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[role])
    text = "the king and the thing — ünïcode"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert ids[0, 0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert int(ids.max()) < model.config.vocab_size
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("role", ROLES)
def test_transformers_would_write_the_same_index(folders: dict[str, Path], role: str) -> None:
    index = folders[role] / "model.safetensors.index.json"
    if role == "new_base":
        assert not index.exists(), "one file has no index"
        return
    text = index.read_text()
    content = json.loads(text)
    assert text == json.dumps(content, indent=2, sort_keys=True) + "\n"
    tensors = read(folders[role])
    assert content["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert content["weight_map"].keys() == tensors.keys()


def test_chat_template_is_posts_alone(folders: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    assert [role for role in ROLES if (folders[role] / "chat_template.jinja").exists()] == ["post"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["post"])
    chat = [{"role": "user", "content": " hello "}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_each_operand_is_sharded_differently(folders: dict[str, Path]) -> None:
    counts = {role: len(list(folders[role].glob("*.safetensors"))) for role in ROLES}
    assert counts == {"post": 2, "base": 3, "new_base": 1}


def test_configs_differ_as_an_instruct_models_do(folders: dict[str, Path]) -> None:
    configs = {role: json.loads((folders[role] / "config.json").read_text()) for role in ROLES}
    against_base = {
        role: sorted(k for k in configs["base"] if configs[role][k] != configs["base"][k]) for role in ROLES
    }
    assert against_base == {
        "post": ["eos_token_id"],
        "base": [],
        "new_base": ["max_position_embeddings"],
    }


def test_values_are_weight_like(folders: dict[str, Path]) -> None:
    post, base, new_base = (read(folders[role]) for role in ROLES)
    shapes = shape_for("tiny").tensors()
    assert {name: t.shape for name, t in post.items()} == shapes
    assert {t.dtype.name for t in (*post.values(), *base.values(), *new_base.values())} == {"bfloat16"}
    equal = {name for name in shapes if post[name].tobytes() == base[name].tobytes()}
    frozen = {f"model.layers.{i}.input_layernorm.weight" for i in (0, 2)} | {"model.norm.weight"}
    assert frozen <= equal
    assert all("norm" in name for name in equal), "only norms may be equal: near 1, few deltas outgrow half an ulp"
    name = "model.layers.1.mlp.up_proj.weight"
    p, b, n = (tensors[name].astype(np.float64) for tensors in (post, base, new_base))
    assert b.std() == pytest.approx(0.02, rel=0.05)
    assert (p - b).std() == pytest.approx(0.001, rel=0.05)
    assert (n - b).std() == pytest.approx(0.004, rel=0.05)


def test_size_and_seed_fix_the_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    write_demo(tmp_path / "again", size="tiny", seed=0)
    write_demo(tmp_path / "other", size="tiny", seed=1)
    first, again, other = (
        digests(folders["post"].parent),
        digests(tmp_path / "again"),
        digests(tmp_path / "other"),
    )
    assert again == first
    assert other.keys() == first.keys()
    assert {name for name in first if other[name] != first[name]} == {
        name for name in first if name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ("800KB", 8e5),
        ("20MB", 2e7),
        ("150MiB", 150 * 2**20),
        ("1.2GB", 1.2e9),
        ("16 gb", 16e9),
        ("1000000", 1e6),
    ],
)
def test_bytes_asked_are_met(size: str, wanted: float) -> None:
    shape = shape_for(size)
    assert shape.nbytes == pytest.approx(wanted, rel=0.05)
    assert shape.hidden % shape.heads == 0
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize("size", ["", "huge", "-1GB", "1.2.3GB", "1e9"])
def test_a_size_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected tiny, small or bytes"):
        write_demo(tmp_path, size=size)
    assert not list(tmp_path.iterdir())


def test_tiny_is_below_a_megabyte_and_small_fits_a_demo() -> None:
    assert shape_for("tiny").nbytes < 1e6
    assert 30e6 < shape_for("small").nbytes < 60e6


def test_writing_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from paramdelta.demo import write_demo; "
        f"write_demo({str(tmp_path)!r}, size='tiny'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
