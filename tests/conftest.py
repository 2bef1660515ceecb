"""A store for a whole run of tests, and the artifacts of one tiny model in it.

torch is imported inside the fixtures: the tests of the command line run without it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dbllm_cli.pipeline.stage import Outcome, run_stage
from dbllm_cli.progress import Progress, SilentProgress
from dbllm_cli.stages.spec import STAGES
from dbllm_cli.store import Artifact, Store, resolve_model

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
STORIES_MODEL = SHARED_DATA / "models" / "stories260K-hf"
STORIES_TEXT = SHARED_DATA / "text" / "tinystories-sample.txt"
TEXT = "The cat sat on the mat, and the dog looked at the cat with great interest. "


MODEL_FIXTURES = {"workshop", "fresh", "llama", "llama_folder", "stories", "stories_folder"}
MODEL_FOLDERS = {"blockwise", "formats", "llm", "records", "stages", "tasks", "training"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark `model` whatever makes or loads one."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & MODEL_FIXTURES or item.path.parent.name in MODEL_FOLDERS:
            item.add_marker(pytest.mark.model)


@dataclass(frozen=True)
class Workshop:
    """A store, and the stages with the settings that suit tiny models."""

    store: Store

    def model(self, folder: Path) -> Artifact:
        return resolve_model(str(folder), None, self.store)

    def run(
        self,
        stage: str,
        inputs: Mapping[str, Artifact],
        progress: Progress | None = None,
        beyond: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Outcome:
        """What a stage ends with; `beyond` are settings past their bounds, to see it fail."""
        spec = STAGES[stage]
        has_effect = stage != "init-fdb" or settings.get("method") == "gptq"
        if has_effect and "compute_dtype" in spec.config.model_fields:
            settings = {"compute_dtype": "float32"} | settings
        config = spec.config(**settings).model_copy(update=beyond)
        return run_stage(spec, config, inputs, self.store, progress=progress or SilentProgress())

    def make(self, stage: str, inputs: Mapping[str, Artifact], **settings: Any) -> Artifact:
        return self.run(stage, inputs, **settings).artifact

    def calibrate(self, model: Artifact, **settings: Any) -> Artifact:
        sizes = {"num_samples": 6, "held_out": 3, "sequence_length": 24, "batch_size": 4}
        return self.make("calibrate", {"model": model}, **(sizes | settings))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept between runs stays out of the user's own cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def fresh(tmp_path: Path) -> Workshop:
    """A workshop with an empty store."""
    return Workshop(Store(tmp_path / "fresh-store"))


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """The workshop that all tests share: what one has made the next one finds."""
    import torch

    # More threads would only wait for each other on shapes this small.
    torch.set_num_threads(1)
    return Workshop(Store(tmp_path_factory.mktemp("shared") / "store"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a tokenizer; to be read, not changed."""
    from tests.tiny_models import save_model

    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def llama(workshop: Workshop, llama_folder: Path) -> Artifact:
    return workshop.model(llama_folder)


@pytest.fixture(scope="session")
def calibration(workshop: Workshop, llama: Artifact) -> Artifact:
    """Sequences that the tiny Llama has written."""
    return workshop.calibrate(llama)


@pytest.fixture(scope="session")
def start(workshop: Workshop, llama: Artifact, calibration: Artifact) -> Artifact:
    """The tiny Llama's fdb after init-fdb."""
    return workshop.make("init-fdb", {"model": llama, "calibration": calibration})


@pytest.fixture
def training(start: Artifact, llama: Artifact, calibration: Artifact) -> dict[str, Artifact]:
    """What both training stages take."""
    return {"student": start, "model": llama, "calibration": calibration}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return path


@pytest.fixture(scope="session")
def stories(workshop: Workshop) -> Artifact:
    """The trained model of the shared data."""
    if not STORIES_MODEL.is_dir():
        pytest.skip(f"needs {STORIES_MODEL}")
    return workshop.model(STORIES_MODEL)
