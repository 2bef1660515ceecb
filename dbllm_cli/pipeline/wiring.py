"""What feeds what: the inputs of the steps, their kinds, and an order without cycles."""

from collections.abc import Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from dbllm_cli.pipeline.nearest import nearest
from dbllm_cli.pipeline.yaml_file import Document, Place
from dbllm_cli.stages.spec import AnyStage, Slot

MODEL = "model"
Wires = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Draft:
    """A step whose inputs are being read."""

    name: str
    stage: AnyStage
    place: Place


def read_wires(document: Document, step: Draft, steps: Mapping[str, Draft]) -> Wires:
    """The names of what feeds each slot of `step`.

    Raises:
        ConfigError: an unknown slot or step, a wrong kind, or a slot left empty.
    """
    given = document.value["steps"][step.name]["inputs"]
    slots = {slot.name: slot for slot in step.stage.inputs}
    for name in given:
        if name not in slots:
            raise document.error(
                (*step.place, "inputs", name),
                f"stage {step.stage.name} has no input {name!r}",
                nearest(name, slots),
            )
    wires: Wires = {}
    for slot in slots.values():
        place = (*step.place, "inputs", slot.name)
        sources = _sources(document, place, slot, given.get(slot.name))
        for source in sources:
            _check_source(document, place, step, slot, source, steps)
        if sources:
            wires[slot.name] = sources
        elif slot.required:
            raise document.error(
                step.place,
                f"step {step.name} lacks the input {slot.name}: {slot.help}",
                f"add `{slot.name}: STEP` to its inputs; {_fitting(slot, step, steps)}",
            )
    return wires


def in_order(document: Document, wires: Mapping[str, Wires]) -> list[str]:
    """The steps, each after those that feed it, else in the file's order.

    Raises:
        ConfigError: steps feed each other in a cycle.
    """
    feeders = {
        step: {name for names in slots.values() for name in names if name != MODEL}
        for step, slots in wires.items()
    }
    sorter = TopologicalSorter(feeders)
    try:
        sorter.prepare()
    except CycleError as error:
        ring = error.args[1]
        raise document.error(
            ("steps", ring[0], "inputs"),
            f"these steps feed each other in a cycle: {' -> '.join(ring)}",
            "take one of these inputs out",
        ) from error
    place = {step: number for number, step in enumerate(feeders)}
    order: list[str] = []
    ready: set[str] = set()
    while sorter.is_active():
        ready.update(sorter.get_ready())
        order.append(min(ready, key=place.__getitem__))
        ready.remove(order[-1])
        sorter.done(order[-1])
    return order


def _sources(document: Document, place: Place, slot: Slot, given: object) -> tuple[str, ...]:
    if given is None:
        return ()
    if slot.many:
        if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
            raise document.error(
                place,
                f"input {slot.name} takes a list of steps, got {given!r}",
                f"write `{slot.name}: [STEP, STEP]`",
            )
        return tuple(given)
    if not isinstance(given, str):
        raise document.error(
            place, f"input {slot.name} takes one step, got {given!r}", f"write `{slot.name}: STEP`"
        )
    return (given,)


def _check_source(
    document: Document,
    place: Place,
    step: Draft,
    slot: Slot,
    source: str,
    steps: Mapping[str, Draft],
) -> None:
    if source != MODEL and source not in steps:
        raise document.error(
            place, f"no step is called {source!r}", nearest(source, [MODEL, *steps])
        )
    kind = MODEL if source == MODEL else steps[source].stage.output
    if kind not in slot.kinds:
        raise document.error(
            place,
            f"input {slot.name} of step {step.name} takes {' or '.join(slot.kinds)}; "
            f"{source} gives {kind}",
            _fitting(slot, step, steps),
        )


def _fitting(slot: Slot, step: Draft, steps: Mapping[str, Draft]) -> str:
    names = [MODEL] if MODEL in slot.kinds else []
    names += [
        name
        for name, other in steps.items()
        if other.stage.output in slot.kinds and name != step.name
    ]
    return f"steps that give it: {', '.join(names) or 'none'}"
