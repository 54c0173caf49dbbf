"""The README says what the committed results say."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_shows_the_committed_leaderboard() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- (results/\S+) -->\n(.*)<!-- end -->", readme, re.DOTALL)
    assert shown
    board = (ROOT / shown[1]).read_text(encoding="utf-8").splitlines()
    rows = [line for line in shown[2].splitlines() if line.startswith("|")]
    assert len(rows) > 10
    missing = [row for row in rows if row not in board]
    assert not missing, f"regenerate the README's table from {shown[1]}: {missing[0]}"


def test_what_the_readme_points_to_is_there() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)\)", readme)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_the_readme_opens_with_two_commands() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks[0].splitlines() == ["pip install -e . && kdbench run", "pip install -e '.[test]' && pytest"]
