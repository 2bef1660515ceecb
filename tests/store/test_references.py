from collections.abc import Callable

import pytest

from dbllm_cli.errors import ArtifactMissingError
from dbllm_cli.store import Store, resolve_input, resolve_model


@pytest.mark.parametrize(
    "reference", ["", "a" * 5000, "a" * 5000 + "/b", "a\0b", "a\ud800b", "~x/y"]
)
def test_a_name_that_no_system_holds_is_a_name_of_nothing(reference: str, store: Store) -> None:
    calls: list[Callable[[], object]] = [
        lambda: resolve_model(reference, None, store),
        lambda: resolve_input(reference, ("model", "fdb", "packed"), store),
        lambda: resolve_input(reference, ("fdb",), store),
        lambda: store.open(reference),
    ]
    for call in calls:
        with pytest.raises(ArtifactMissingError) as caught:
            call()
        assert caught.value.message.encode()
        assert len(caught.value.message) < 400
        assert caught.value.hint
