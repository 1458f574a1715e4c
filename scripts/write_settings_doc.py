"""Write docs/settings.md from the docstrings of samv2/common/settings.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from samv2.common.settings_text import SettingText, section_texts, setting_texts
from samv2.configs import shipped_names
from samv2.federated.run_folder import CHANGEABLE

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

Every setting of a run, as `samv2 train --help` lists them. This page is made by
`python scripts/write_settings_doc.py` from `samv2/common/settings.py`.

A settings file is TOML with a table a section (`--config FILE`); `--set KEY=VALUE` goes
before the file, e.g. `--set federation.rounds=5 --set data.domains=legal,mail=mail.jsonl`.
Lists are comma-separated there and TOML lists in a file. `--config NAME` takes a shipped
file:
{shipped}.
The defaults below are those of `samv2 train` without `--config`.

A run that is resumed keeps the settings that it was started with. Only these may differ:
{changeable}.
"""
COLUMNS = ("key", "type", "default", "meaning")


def page() -> str:
    """The page's text."""
    texts = setting_texts()
    parts = [
        HEAD.format(shipped=_listed(shipped_names()), changeable=_listed(CHANGEABLE))
    ]
    for section, about in section_texts().items():
        own = [text for text in texts if text.section == section]
        if section:
            parts.append(f"\n## {section}\n\n{about}\n")
        parts += ["\n", *_table(own)]
    return "".join(parts)


def _table(texts: Iterable[SettingText]) -> list[str]:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS)]
    for text in texts:
        default = f"`{text.default}`" if text.default else ""
        rows.append((f"`{text.key}`", text.kind, default, _meaning(text)))
    return [f"| {' | '.join(row)} |\n" for row in rows]


def _meaning(text: SettingText) -> str:
    words = text.meaning.replace("``", "`").replace("|", "\\|")
    if all(f"`{choice}`" in words for choice in text.choices):
        return words
    return f"{words} One of: {', '.join(f'`{item}`' for item in text.choices)}."


def _listed(words: Iterable[str]) -> str:
    text = ", ".join(f"`{word}`" for word in words)
    return "\n".join(textwrap.wrap(text, 90, break_on_hyphens=False))


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
