"""A wall clock that is set changes nothing: only clocks that never go back are asked."""

from __future__ import annotations

import ast
from pathlib import Path

import vllm_ssd

WALL_CLOCKS = {
    "time": {"time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "CLOCK_REALTIME"},
    "datetime": {"now", "today", "utcnow"},
    "date": {"today"},
}


def test_no_line_asks_a_wall_clock() -> None:
    found = []
    for file in sorted(Path(vllm_ssd.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Attribute(value=ast.Name(id=owner), attr=name):
                    asked = name in WALL_CLOCKS.get(owner, ())
                case ast.Attribute(value=ast.Attribute(attr=owner), attr=name):
                    asked = name in WALL_CLOCKS.get(owner, ())
                case ast.ImportFrom(module="time", names=names):
                    asked = any(each.name in WALL_CLOCKS["time"] for each in names)
                case _:
                    asked = False
            if asked:
                found.append(f"{file.name}:{getattr(node, 'lineno', '?')}")
    assert found == []
