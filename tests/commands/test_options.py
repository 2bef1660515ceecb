"""Options are made from the stages' settings, and mean what those say."""

import inspect
import re

import pytest
from pydantic_core import PydanticUndefined

from dbllm_cli.commands.options import config_parameters, option_name
from dbllm_cli.commands.stages import _parameters
from dbllm_cli.configs import InitFdbConfig
from dbllm_cli.stages.spec import STAGES, AnyStage
from tests.commands.conftest import Call, DbllmCall


@pytest.mark.parametrize("spec", STAGES.values(), ids=STAGES)
def test_every_setting_is_an_option_with_a_help_text(spec: AnyStage, dbllm: DbllmCall) -> None:
    shown = dbllm(spec.name, "--help").out

    for name, field in spec.config.model_fields.items():
        assert f"  {option_name(name)} " in shown
        assert field.description
        assert field.description.split()[0] in shown


@pytest.mark.parametrize("spec", STAGES.values(), ids=STAGES)
def test_every_option_has_the_default_of_its_setting(spec: AnyStage) -> None:
    parameters = {parameter.name: parameter for parameter in config_parameters(spec.config)}

    for name, field in spec.config.model_fields.items():
        default = parameters[name].default.default
        assert field.default is not PydanticUndefined
        assert (tuple(default) if isinstance(default, list) else default) == field.default


@pytest.mark.parametrize("spec", STAGES.values(), ids=STAGES)
def test_no_setting_takes_the_option_of_another_parameter(spec: AnyStage) -> None:
    inspect.Signature(_parameters(spec))  # raises on a name given twice


def test_bounds_stand_in_the_help(dbllm: DbllmCall) -> None:
    assert "multiple of 8)" in dbllm("init-fdb", "--help").out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["init-fdb", "model", "--group-size", "0"], "--group-size: "),
        (["init-fdb", "model", "--group-size", "12"], "--group-size: "),
        (["init-fdb", "model", "--method", "best"], "'--method': 'best' is not one of 'als'"),
        (["init-fdb", "model", "--group-size", "many"], "'--group-size': "),
        (["calibrate", "model", "--source", "text"], "source text needs text"),
        (["calibrate", "model", "--documents", "all"], "--documents: "),
        (["calibrate", "model", "--temperature", "nan"], "--temperature: "),
        (["calibrate", "model", "--device", "gpu"], "'--device': 'gpu' is not one of cpu, cuda"),
    ],
)
def test_a_wrong_value_is_a_usage_error_that_names_the_option(
    arguments: list[str], problem: str, dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    result = dbllm(*arguments)

    assert result.code == 2
    assert problem in result.err
    assert f"hint: dbllm {arguments[0]} --help" in result.err
    assert not stage_calls


def test_an_option_without_effect_is_refused_with_the_option_that_it_needs(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    result = dbllm("init-fdb", "model", "--num-samples", "8")

    assert result.code == 2
    assert "--num-samples has no effect here: it needs --method gptq" in result.err
    assert dbllm("init-fdb", "model", "--batch-size", "4").code == 0  # its default
    assert "needs --method gptq)" in dbllm("init-fdb", "--help").out


@pytest.mark.parametrize("name", ["x" * 5000, "x" * 256, "a\0b", "\ud800"])
@pytest.mark.parametrize(
    "line",
    [["calibrate", "{}"], ["calibrate", "model", "--store", "{}"], ["pack", "x", "--evals", "{}"],
     ["run", "{}"], ["status", "{}"], ["ls", "--store", "{}"], ["gc", "{}"], ["show", "{}"],
     ["gc", "--keep", "{}"], ["verify", "{}"], ["generate", "{}", "--prompt", "x"]],
)  # fmt: skip
def test_a_name_that_no_file_can_have_is_a_usage_error(
    line: list[str], name: str, dbllm: DbllmCall, model: str
) -> None:
    result = dbllm(*(part.replace("{}", name) for part in line))

    assert result.code == 2
    assert re.search(r"can't be a path: |null byte|surrogates not", result.err)
    assert len(result.err) < 400


@pytest.mark.parametrize("device", ["meta", "cuda:99999999999999", "cpu:-1", "cuda:", "CUDA", ""])
@pytest.mark.parametrize("line", [["calibrate", "model"], ["run", "x.yaml"], ["generate", "model"]])
def test_a_device_that_can_t_run_is_a_usage_error(
    line: list[str], device: str, dbllm: DbllmCall, model: str
) -> None:
    given = ["--prompt", "x"] if line[0] == "generate" else []
    result = dbllm(*line, "--device", device, *given)

    assert result.code == 2
    assert "is not one of cpu, cuda" in result.err


def test_every_wrong_value_is_told_at_once(dbllm: DbllmCall, model: str) -> None:
    result = dbllm("calibrate", "model", "--num-samples", "0", "--held-out", "-1")

    assert "--num-samples: " in result.err
    assert "--held-out: " in result.err


def test_options_reach_the_stage_as_settings(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    dbllm("init-fdb", "model", "--group-size", "32", "--method", "mse", "--levels", "plain")

    assert stage_calls[0].config == InitFdbConfig(group_size=32, method="mse", levels="plain")


def test_a_setting_with_many_values_is_a_repeated_option(
    dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    dbllm("init-fdb", "model", "--exclude", "*.q_proj", "--exclude", "*.k_proj")

    assert stage_calls[0].config.exclude == ("*.q_proj", "*.k_proj")
    assert stage_calls[0].config.include == ("*",)


@pytest.mark.parametrize("option", ["--keep-latents", "--no-keep-latents"])
def test_a_truth_value_is_a_pair_of_options(
    option: str, dbllm: DbllmCall, stage_calls: list[Call], model: str
) -> None:
    calibration = dbllm("calibrate", "model").path
    student = dbllm("init-fdb", "model").path

    dbllm("reconstruct", student, "model", calibration, option)

    assert stage_calls[-1].config.keep_latents is (option == "--keep-latents")
