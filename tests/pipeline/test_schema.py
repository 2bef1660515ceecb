import json

from dbllm_cli.pipeline.schema import pipeline_schema
from dbllm_cli.stages.spec import STAGES


def test_every_stage_brings_its_settings_and_inputs() -> None:
    schema = pipeline_schema()
    assert set(schema["$defs"]) == set(schema["properties"]["steps"]["properties"]) == set(STAGES)
    for name, spec in STAGES.items():
        step = schema["$defs"][name]["properties"]
        assert set(step["config"]["properties"]) == set(spec.config.model_fields)
        assert step["config"]["additionalProperties"] is False
        assert set(step["inputs"]["properties"]) == {slot.name for slot in spec.inputs}
        assert step["inputs"]["required"] == [slot.name for slot in spec.inputs if slot.required]


def test_a_slot_that_takes_many_is_a_list_of_names() -> None:
    inputs = pipeline_schema()["$defs"]["pack"]["properties"]["inputs"]["properties"]
    assert inputs["evals"]["type"] == "array"
    assert inputs["fdb"]["type"] == "string"


def test_the_schema_is_plain_json() -> None:
    assert json.loads(json.dumps(pipeline_schema(), allow_nan=False)) == pipeline_schema()
