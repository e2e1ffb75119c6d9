"""`cachedattn inspect` and `cachedattn check`: a look into a store's file, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table

from cachedattn import _core
from cachedattn.cli_common import progress_bar


def size_text(num_bytes: int) -> str:
    """A size that people can read: '1.5 GiB'."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def chains(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The longest chain from each first block: number of blocks in all, deepest tokens.

    A chain is a conversation, or several that begin alike. Longest first.
    """
    by_key = {block["key"]: block for block in blocks}
    found: dict[str, dict[str, Any]] = {}
    for block in blocks:
        root, tokens = block, block["num_tokens"]
        while root["parent"] in by_key:
            root = by_key[root["parent"]]
            tokens += root["num_tokens"]
        entry = found.setdefault(root["key"], {"root": root["key"], "blocks": 0, "tokens": 0})
        entry["blocks"] += 1
        entry["tokens"] = max(entry["tokens"], tokens)
    return sorted(found.values(), key=lambda entry: -entry["tokens"])


def run_inspect(store: Path, as_json: bool) -> None:
    """Prints what the store in directory `store` holds. Writes nothing to it."""
    info = _core.inspect_store(str(store))
    if as_json:
        print(json.dumps(info))
        return
    console = Console()
    table = Table(title=f"Store {store}", show_header=False)
    for name, value in info.items():
        if name == "blocks":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{key} {part}" for key, part in value.items())
        elif name.endswith("bytes"):
            value = size_text(value)
        elif name == "identity":
            value = value[:16]
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    if not info["blocks"]:
        console.print("The store is empty.")
        return
    table = Table(title="Conversations (those with one beginning count as one)")
    for column in ("first block", "blocks", "longest history, tokens"):
        table.add_column(column, justify="left" if column == "first block" else "right")
    for chain in chains(info["blocks"])[:20]:
        table.add_row(chain["root"][:16], str(chain["blocks"]), f"{chain['tokens']:,}")
    console.print(table)


def run_check(store: Path, deep: bool, key: Path | None, as_json: bool) -> int:
    """Verifies the store in directory `store`; the exit code: 0 sound, 1 damaged."""
    with progress_bar(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        task = bar.add_task("checking", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        result = _core.check_store(str(store), deep, str(key or ""), progress)
    damage = result["damage"]
    if as_json:
        print(json.dumps({**result, "deep": deep, "ok": not damage}))
        return 1 if damage else 0
    what = "every byte" if deep else "headers"
    blocks = sum(found["slot"] is not None for found in damage)
    print(f"{result['checked']} blocks checked ({what}), {blocks} damaged")
    for found in damage:
        print(f"  {damage_text(found)}")
    if blocks:
        print("A damaged block is never used: it is a miss, and its slot is written again.")
    if not result["indexed"]:
        print("The store was not closed cleanly: an old copy of a block cannot be told from a new.")
    if result["erased"]:
        print(f"{result['erased']} blocks are of tenants whose key was erased.")
    return 1 if damage else 0


def damage_text(found: dict[str, Any]) -> str:
    """'slot 3, block 0123456789abcdef: what is wrong'; what is no slot names itself."""
    if found["slot"] is None:
        return found["what"]
    block = f", block {found['key'][:16]}" if found["key"] else ""
    return f"slot {found['slot']}{block}: {found['what']}"


def run_erase(store: Path, tenant: str, key: Path) -> int:
    """Drops the key of `tenant`; the exit code: 0 done, 1 there was none."""
    erased = _core.erase_tenant(str(store), str(key), tenant)
    if erased:
        print(f"{store}: erased tenant '{tenant}'")
    else:
        print(f"{store}: no key of tenant '{tenant}'; nothing to erase")
    return 0 if erased else 1
