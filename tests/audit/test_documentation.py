"""What docs/audit.md shows is what happens."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from holdfast.audit import Auditor, AuditReport

PAGE = Path(__file__).parents[2].joinpath("docs", "audit.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]
SHOWN = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
MENDED = {
    "    warm_up = 0\n": '    progress = {"warm_up": 0}\n',
    "        nonlocal warm_up\n": "",
    "warm_up += 1": 'progress["warm_up"] += 1',
    "warm_up / 100": 'progress["warm_up"] / 100',
    '"optimizer": optimizer}': '"optimizer": optimizer, "progress": progress}',
}


def said(report: AuditReport) -> list[str]:
    """What the report says, but for times and bits, which no two machines share."""
    facts = [f"{word:<9} {text}" for word, text in report.facts() if word != "took"]
    causes = [[f"cause: {cause.what}", *cause.evidence, cause.advice] for cause in report.causes]
    differs = [f"differs as well: {report.others()}"] if report.divergence else []
    return [report.title, *facts, *differs, *(line for lines in causes for line in lines)]


@pytest.mark.parametrize(("shown", "mended"), [(SHOWN[0], False), (SHOWN[1], True)], ids=["as written", "mended"])
def test_the_example(
    shown: str, mended: bool, auditor: Auditor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training as it stands there does not resume exactly; with the change that the text describes, it does."""
    code = CODE
    for old, new in MENDED.items() if mended else ():
        assert old in code
        code = code.replace(old, new)
    (tmp_path / "train.py").write_text(code)
    monkeypatch.chdir(tmp_path)

    report = auditor.audit("train.py:training")

    assert report.exact is mended
    assert [line for line in said(report) if line not in shown] == []


def test_every_kind_of_cause_is_explained() -> None:
    """The table has a row for each kind that the code can name."""
    sources = Path(__file__).parents[2].joinpath("src", "holdfast", "audit")
    texts = [path.read_text(encoding="utf-8") for path in sources.rglob("*.py")]
    kinds = {kind for text in texts for kind in re.findall(r'\bkind="([a-z ]+)"', text)}
    kinds |= set(re.findall(r'^    "[a-z]+": \(\n        "([a-z]+)"', "".join(texts), re.MULTILINE))

    assert {"data", "hash order", "gradients", "forgotten"} <= kinds
    assert [kind for kind in kinds if f"| `{kind}` |" not in PAGE] == []
