"""Scripts of one family agree to the letter: below the line, and in every definition above it that they share.

`python tests/test_shared.py algos/sac.py algos/sac_pmoe.py` copies what is shared from the first into the others.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = {"sac": "sac_*.py", "ppo": "ppo_*.py", "pqn": "pqn_*.py"}  # base -> the others
OWN = {"docstring", "Args", "Agent", "Actor", "ActorCritic", "Network", "pick", "update"}  # what a method may change
MORE = {"ppo_dac": {"prepare", "learn"}}  # what one method may change besides, which learns in two MDPs
LINE = "# " + "=" * 118 + "\n# That was the agent."


def parts(text: str) -> dict[str, str]:
    """Name -> text of each definition above the line, of the lines of imports, and of all below the line."""
    above, below = text.split(LINE)
    lines, found = above.splitlines(keepends=True), {"below": below}
    for node in ast.parse(above).body:
        name = getattr(node, "name", "imports" if isinstance(node, (ast.Import, ast.ImportFrom)) else "docstring")
        blank = lines[node.lineno - 2] if name in found and not lines[node.lineno - 2].strip() else ""
        found[name] = found.get(name, "") + blank + "".join(lines[node.lineno - 1 : node.end_lineno])
    return found


def fields(text: str) -> dict[str, str]:
    """Name -> line of each flag."""
    lines = parts(text)["Args"].splitlines()
    return {line.split(":")[0].strip(): line for line in lines if ": " in line and " = " in line}


def pairs() -> list[tuple[Path, Path]]:
    """(base, other) of every family; the multi-task scripts are a family of their own."""
    found = []
    for base, pattern in FAMILIES.items():
        others = sorted((ROOT / "algos").glob(pattern))
        found += [(ROOT / "algos" / f"{base}.py", path) for path in others if "multitask" not in path.stem]
    return found


@pytest.mark.parametrize(("base", "other"), pairs(), ids=lambda path: path.stem)
def test_scripts_of_a_family_agree(base, other):
    theirs, mine = parts(base.read_text()), parts(other.read_text())
    for name in theirs.keys() & mine.keys() - OWN - MORE.get(other.stem, set()):
        assert theirs[name] == mine[name], f"{name} of {other.name}: run python tests/test_shared.py {base} {other}"
    assert {"below", "imports", "train"} <= theirs.keys() & mine.keys()
    theirs, mine = fields(base.read_text()), fields(other.read_text())
    own = {"target_kl"} if other.stem == "ppo_pmoe" else set()  # another default
    different = [name for name in theirs.keys() & mine.keys() - own if theirs[name] != mine[name]]
    assert not different, f"flags of {other.name}"


def requirements(text: str) -> dict[str, str]:
    """Package -> its line without comment, of requirements.txt or of a block of inline script metadata."""
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines()]
    return {re.split(r"[\[<>=]", line)[0]: line for line in lines if line and not line.startswith(("#", "-"))}


@pytest.mark.parametrize("path", sorted((ROOT / "algos").glob("*.py")), ids=lambda path: path.stem)
def test_inline_requirements_are_those_of_requirements_txt(path):
    """The block of inline script metadata (PEP 723) names what the script imports, with the tested ranges."""
    text = path.read_text()
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)[1]
    block = "\n".join(line.removeprefix("# ").strip(' ",') for line in block.splitlines() if line.startswith("#     "))
    inline, known = requirements(block), requirements((ROOT / "requirements.txt").read_text())
    assert all(known[name] == line for name, line in inline.items()), inline
    imported = set(re.findall(r"^ *(?:import|from) ([a-z]+)", text, re.M)) - sys.stdlib_module_names - {"imageio"}
    assert imported <= inline.keys() and ("minatar" in inline) == ("minatar" in imported)


if __name__ == "__main__":
    source, *others = map(Path, sys.argv[1:])
    for path in others:
        text, mine = path.read_text(), parts(path.read_text())
        for name, part in parts(source.read_text()).items():
            if name not in OWN | MORE.get(path.stem, set()) and name in mine:
                text = text.replace(mine[name], part)
        path.write_text(text)
