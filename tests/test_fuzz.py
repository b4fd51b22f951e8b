"""A short, seeded round of every fuzzing target (tests/fuzz/targets.py)."""

from pathlib import Path

import pytest

from tests.fuzz.run import run_mutations
from tests.fuzz.targets import Target, Targets

NAMES = """safetensors pytorch pytorch_legacy pickle tensorflow tensorflow_block tensorflow_data snappy zip config model
modules vocabulary tokenizer""".split()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    made = Targets(tmp_path_factory.mktemp("fuzz")).all
    assert list(made) == NAMES
    return made


@pytest.mark.parametrize("name", NAMES)
def test_target(targets: dict[str, Target], name: str, seed: int, tmp_path: Path) -> None:
    for content in targets[name].seeds:
        targets[name].run(content)
    assert run_mutations(targets[name], seed, tmp_path, count=300) == 300
