"""The Python of the README runs as written, from top to bottom."""

import re

from tests.conftest import ASSETS


def test_python(monkeypatch, capsys):
    root = ASSETS.parents[1]
    monkeypatch.chdir(root)
    blocks = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), flags=re.DOTALL)
    needs_hub = [block for block in blocks if '"philippehansen/' in block]
    assert len(blocks) > 4 and len(needs_hub) == 1
    scope = {}
    for block in blocks:
        if block not in needs_hub:
            exec(block, scope)
    assert scope["x"].shape == (1, 3, 400, 600) and scope["latents"].shape == (1, 8, 50, 75)
    assert scope["sample"].shape == scope["x"].shape
    assert capsys.readouterr().out.count("torch.Size([1, 3, 16, 64, 64])") == 2
