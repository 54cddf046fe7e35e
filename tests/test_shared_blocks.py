"""Shared blocks are the same to the letter in every script that has them; every flag is read and explained.

A block stands between `# === shared: NAME ===` and `# === end shared ===`.

`python tests/test_shared_blocks.py SCRIPT` copies the blocks of SCRIPT (default algos/sac.py) into all other scripts.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ALGOS = Path(__file__).parent.parent / "algos"
SCRIPTS = sorted(ALGOS.glob("*.py"))
BLOCK = re.compile(r"^( *# === shared: ([^\n]+) ===\n)(.*?)(^ *# === end shared ===\n)", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> dict[str, str]:
    """Name -> text of every shared block."""
    return {match[2]: match[3] for match in BLOCK.finditer(text)}


def repair(text: str, source: dict[str, str]) -> str:
    """`text` with the content of its shared blocks taken from `source`."""
    return BLOCK.sub(lambda m: m[1] + source.get(m[2], m[3]) + m[4], text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shared_blocks_are_equal(script):
    text = script.read_text()
    assert text.count("=== shared:") == text.count("=== end shared ===") == len(blocks(text)) > 0
    for other in SCRIPTS:
        theirs = blocks(other.read_text())
        for name, body in blocks(text).items():
            same = theirs.get(name, body) == body
            assert same, f"{name!r} differs between {script.name} and {other.name}: run python {__file__} SCRIPT"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_flag_is_read_and_explained(script):
    text = script.read_text()
    tree = ast.parse(text)
    args = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    owners = {"args", "run", "saved"}
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    read = {node.attr for node in nodes if node.value.id in owners}
    assert len(fields) > 15
    for field in fields:
        assert field.target.id in read, f"{script.name}: --{field.target.id} is never read"
        line = text.splitlines()[field.end_lineno - 1]
        assert "  # " in line, f"{script.name}: --{field.target.id} has no comment, so --help says nothing of it"


def test_repair_restores_a_changed_block():
    text = SCRIPTS[0].read_text()
    name, body = next(iter(blocks(text).items()))
    broken = text.replace(body, body + "x = 1\n", 1)
    assert blocks(broken)[name] != body
    assert repair(broken, blocks(text)) == text


if __name__ == "__main__":
    source = blocks((Path(sys.argv[1]) if len(sys.argv) > 1 else ALGOS / "sac.py").read_text())
    for path in SCRIPTS:
        path.write_text(repair(path.read_text(), source))
