import pytest

from dbllm_cli.machine import processor as machine


@pytest.mark.parametrize(
    ("flags", "name"),
    [("fpu avx512_bf16", "Xeon"), ("fpu amx_bf16 amx_tile", "Xeon with AMX")],
)
def test_two_machines_of_one_name_are_told_apart_by_amx(
    monkeypatch: pytest.MonkeyPatch, flags: str, name: str
) -> None:
    monkeypatch.setattr(machine, "cpu_info", lambda: {"model name": "Xeon", "flags": flags})
    assert machine.processor() == name
