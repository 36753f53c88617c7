"""The examples of docs/integrations.md, by section and language, and checkpoints of the names they use."""

from __future__ import annotations

from pages import ROOT, blocks_of

DOCUMENT = ROOT / "docs" / "integrations.md"
NAMES = {"post": "Llama-3-8B-Instruct", "base": "Llama-3-8B", "new_base": "Llama-3.1-8B"}


def examples(section: str, language: str) -> list[str]:
    """Return the code of a section, block by block."""
    text = DOCUMENT.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = [block.code for block in blocks_of(text) if block.language == language]
    assert found, f"no {language} in {section}"
    return found
