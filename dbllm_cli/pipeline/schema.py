"""The JSON schema of the pipeline file, for editors."""

from typing import Any

from dbllm_cli.pipeline.file import SCHEMA_VERSION, STEP_NAME
from dbllm_cli.stages.spec import STAGES, AnyStage, Slot


def pipeline_schema() -> dict[str, Any]:
    """The JSON schema of a pipeline file, made from the stages and their settings."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dbllm pipeline",
        "type": "object",
        "additionalProperties": False,
        "required": ["schema_version", "model", "steps"],
        "properties": {
            "schema_version": {"const": SCHEMA_VERSION},
            "model": _MODEL_SCHEMA,
            "steps": {
                "type": "object",
                "minProperties": 1,
                "propertyNames": {"pattern": STEP_NAME, "not": {"const": "model"}},
                "properties": {name: {"$ref": f"#/$defs/{name}"} for name in STAGES},
                "additionalProperties": _named_step(),
            },
        },
        "$defs": {spec.name: _step(spec) for spec in STAGES.values()},
    }


_MODEL_SCHEMA = {
    "type": "object",
    "description": "the full-precision model",
    "additionalProperties": False,
    "required": ["path"],
    "properties": {
        "path": {
            "type": "string",
            "minLength": 1,
            "description": "a folder, a hub id OWNER/NAME, a .gguf file or builtin:smollm2-135m",
        },
        "revision": {
            "type": ["string", "null"],
            "description": "commit, tag or branch of a hub id",
        },
    },
}


def _named_step() -> dict[str, Any]:
    """A step with a name of its own: its key `stage` says which stage it uses."""
    return {
        "type": "object",
        "required": ["stage"],
        "properties": {"stage": {"enum": list(STAGES)}},
        "allOf": [
            {
                "if": {"properties": {"stage": {"const": name}}},
                "then": {"$ref": f"#/$defs/{name}"},
            }
            for name in STAGES
        ],
    }


def _step(spec: AnyStage) -> dict[str, Any]:
    required = [slot.name for slot in spec.inputs if slot.required]
    config = spec.config.model_json_schema()
    return {
        "type": "object",
        "description": spec.help,
        "additionalProperties": False,
        "required": ["inputs"] if required else [],
        "properties": {
            "stage": {"const": spec.name},
            "inputs": {
                "type": "object",
                "additionalProperties": False,
                "required": required,
                "properties": {slot.name: _slot(slot) for slot in spec.inputs},
            },
            "config": config,
        },
    }


def _slot(slot: Slot) -> dict[str, Any]:
    name = {"type": "string", "description": f"{slot.help}: the name of a step"}
    if "model" in slot.kinds:
        name["description"] += ", or model"
    return {"type": "array", "items": name} if slot.many else name
