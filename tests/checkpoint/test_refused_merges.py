"""Every malformed file, met by a whole merge: refused with its own message and exit code 2, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_header import REFUSED

import paramdelta
from paramdelta.errors import EXIT_BAD_INPUT


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("role", ["post", "new_base"])
def test_a_merge_refuses_the_file(case: str, role: str, tmp_path: Path) -> None:
    content, message, _ = REFUSED[case]
    folders = {name: tmp_path / name for name in ("post", "base", "new_base")}
    for folder in folders.values():
        folder.mkdir()
        save_file({"a": np.zeros(1, np.float32)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folders[role] / "model.safetensors").write_bytes(content)
    with pytest.raises(paramdelta.InputError) as caught:
        paramdelta.merge(**folders, out=tmp_path / "out")
    assert message in str(caught.value)
    assert str(folders[role] / "model.safetensors") in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "new_base", "post"]
