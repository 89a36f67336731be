"""Progress in a notebook: one output of the cell, which is replaced. The notebook's own modules are fakes that record."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from shardferry.actors.progress import Progress
from shardferry.pipeline import display, progress


class Notebook(ModuleType):
    """Records what is displayed, as ``IPython.display`` would show it: one list for each output, of what it has shown."""

    def __init__(self) -> None:
        super().__init__("IPython.display")
        self.outputs: list[list[dict[str, str]]] = []

    def display(self, content: dict[str, str], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        output = [content]
        self.outputs.append(output)

        class Handle:
            def update(self, content: dict[str, str], *, raw: bool) -> None:
                assert raw
                output.append(content)

        return Handle()


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Notebook:
    found = Notebook()
    for name, module in (
        ("ipykernel", ModuleType("ipykernel")),
        ("IPython", ModuleType("IPython")),
        (found.__name__, found),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "shardferry.pipeline.notebook_bar", raising=False)
    return found


def test_a_cell_has_one_bar(
    notebook: Notebook, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with progress("<loading>") as shown:
        for at, *ranks in ((1.0, 0, 0), (60.0, 0, 1), (61.0, 1, 1), (63.0, 1, 2), (64.0, 2, 2)):
            now[0] = at
            total = 0 if at < 60 else 2_000_000
            shown([Progress(1_000_000 * done, total) for done in ranks])
    [output] = notebook.outputs
    assert [content["text/plain"] for content in output] == [
        "<loading>: waiting for the ranks to start",
        "<loading>:  25% 976.6 KiB of 3.8 MiB; slowest is rank 0 at 0%",
        "<loading>:  50% 1.9 MiB of 3.8 MiB, 1 MB/s, 2 s left; slowest is rank 0 at 50%",
        "<loading>:  75% 2.9 MiB of 3.8 MiB, 667 kB/s, 2 s left; slowest is rank 0 at 50%",
        "<loading>: 100% 3.8 MiB of 3.8 MiB, 750 kB/s",
    ]
    html = [content["text/html"] for content in output]
    assert [text.partition(" style")[0] for text in html] == [
        "<progress",
        '<progress value="0.2500"',
        '<progress value="0.5000"',
        '<progress value="0.7500"',
        '<progress value="1.0000"',
    ]
    assert html[-1].endswith("&lt;loading&gt;: 100% 3.8 MiB of 3.8 MiB, 750 kB/s")
    assert capsys.readouterr() == ("", "")
