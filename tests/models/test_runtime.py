"""A version answers as its file says, on the provider that was asked for, or not at all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model

from models import runtime
from models.errors import NoProvider, NoSuchVersion, Tampered
from models.reference import MIN_PATIENTS, Reference
from models.registry import Registry
from models.runtime import Model

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def test_logits_and_features_are_those_of_the_file(registry: Registry, tmp_path: Path) -> None:
    model = Model.load(registry, tiny_model.shelve(registry, tmp_path), threads=1)
    batch = np.stack([np.full((1, 32, 32), grey, np.float32) for grey in (0.0, 0.5, 1.0)])
    logits, features = model.predict(batch)
    assert np.allclose(logits, [[-4, 0], [0, 0], [4, 0]], atol=1e-5)
    assert np.allclose(features, [[0, 0], [0.5, 0.25], [1, 1]], atol=1e-5)
    assert model.predict(batch[:1])[0].shape == (1, 2)
    assert (model.provider, model.degraded, model.reference) == ("cpu", "", None)


def test_a_provider_that_is_not_there_is_refused(registry: Registry, tmp_path: Path) -> None:
    if "cuda" in runtime.providers():
        pytest.skip("this machine has CUDA")
    version = tiny_model.shelve(registry, tmp_path)
    with pytest.raises(NoProvider, match="allow_degraded"):
        Model.load(registry, version, provider="cuda")
    model = Model.load(registry, version, provider="cuda", allow_degraded=True)
    assert model.provider == "cpu"
    assert model.degraded == "runs on CPU: CUDA is not available"


def test_a_provider_that_is_listed_but_does_not_load_is_refused_too(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime lists CUDA by its build, warns when its libraries are missing, and goes on with the CPU."""
    if "cuda" in runtime.providers():
        pytest.skip("this machine has CUDA")
    monkeypatch.setattr(runtime, "providers", lambda: ("cpu", "cuda"))
    version = tiny_model.shelve(registry, tmp_path)
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"), pytest.raises(NoProvider):
        Model.load(registry, version, provider="cuda")


def test_a_changed_file_is_never_loaded(registry: Registry, tmp_path: Path) -> None:
    version = tiny_model.shelve(registry, tmp_path)
    file = registry.folder(version) / "model.onnx"
    file.chmod(0o600)
    file.write_bytes(tiny_model.onnx_bytes(slope=9))
    with pytest.raises(Tampered, match="hash"):
        Model.load(registry, version)


def test_what_is_no_model_of_this_kind_is_refused_when_it_is_loaded(registry: Registry, tmp_path: Path) -> None:
    for data in (b"not onnx", tiny_model.onnx_bytes(classes=3)):
        file = tmp_path / "other.onnx"
        file.write_bytes(data)
        version = registry.add(file, tiny_model.card(data), corpus=["OST-A", "OST-B"])
        with pytest.raises(Tampered):
            Model.load(registry, version)


def test_a_version_that_is_not_there_is_named(registry: Registry) -> None:
    with pytest.raises(NoSuchVersion):
        Model.load(registry, "20260101-0123456789")


def test_onnx_runtime_neither_notes_nor_reports_that_it_runs(registry: Registry, tmp_path: Path) -> None:
    """Its telemetry leaves an id and a queue below the user's home, whence it is sent."""
    version, home = tiny_model.shelve(registry, tmp_path), tmp_path / "home"
    home.mkdir()
    code = (
        "import sys; from pathlib import Path; from models.registry import Registry; from models.runtime import Model\n"
        "Model.load(Registry(Path(sys.argv[1])), sys.argv[2], threads=1)"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "XDG_"))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "models"), version], env=plain | {"HOME": str(home)}, check=True)
    assert list(home.rglob("*")) == []


def test_onnx_runtime_is_imported_in_one_place() -> None:
    root = Path(runtime.__file__).parents[1]
    sources = (file for package in ("node", "models", "training") for file in (root / package).rglob("*.py"))
    importing = [file.name for file in sources if re.search(r"(?m)^\s*(import|from) onnxruntime", file.read_text("utf-8"))]
    assert importing == ["runtime.py"]


def test_threads_are_the_physical_cores_unless_told() -> None:
    assert 1 <= runtime.physical_cores() <= (__import__("os").cpu_count() or 1)


# --- reference ----------------------------------------------------------------------------------------------------------------


def cloud(count: int = 60, *, per_patient: int = 2, seed: int = 0) -> tuple[np.ndarray, list[str]]:
    """Draw features of two groups of patients, and the patient of each row."""
    rng = np.random.default_rng(seed)
    centres = np.repeat(np.array([[0.0, 0, 0], [10, 0, 0]]), count // 2, axis=0)
    features = np.repeat(centres, per_patient, axis=0) + rng.normal(size=(count * per_patient, 3))
    return features, [f"OST-{at // per_patient}" for at in range(count * per_patient)]


def test_training_like_images_are_inside_and_foreign_ones_outside() -> None:
    reference = Reference.fit(*cloud(), clusters=4)
    assert reference is not None
    fresh, _ = cloud(seed=1)
    assert reference.is_outlier(fresh).mean() < 0.1
    assert reference.is_outlier(np.array([[5.0, 40, 0], [0, 0, -30]])).all()
    assert reference.shares.sum() == pytest.approx(1)
    assert (np.diff(reference.distances) >= 0).all()


def test_no_centroid_belongs_to_few_patients() -> None:
    """Ten images of one patient far from all others, which k-means would give a centroid of their own."""
    features, patients = cloud()
    alone = np.full((10, 3), 500.0) + np.random.default_rng(2).normal(size=(10, 3))
    reference = Reference.fit(np.vstack([features, alone]), [*patients, *["OST-ALONE"] * 10], clusters=8)
    assert reference is not None
    white = (alone - reference.mean) / reference.spread
    apart = np.sqrt(((white[:, None] - reference.centroids[None]) ** 2).sum(-1)).min()
    assert apart > 1
    assert len(reference.centroids) <= 61 // MIN_PATIENTS


def test_too_few_patients_give_no_reference() -> None:
    features, patients = cloud(2 * MIN_PATIENTS - 2)
    assert Reference.fit(features, patients) is None


def test_a_reference_is_the_same_for_the_same_seed_and_reads_back(registry: Registry, tmp_path: Path) -> None:
    one, two = (Reference.fit(*cloud(), seed=3) for _ in range(2))
    assert one is not None
    assert two is not None
    assert np.array_equal(one.centroids, two.centroids)
    back = Reference.from_bytes(one.to_bytes())
    assert np.array_equal(back.distances, one.distances)
    with pytest.raises(Tampered):
        Reference.from_bytes(b"nothing")
    with pytest.raises(Tampered):
        Reference.from_bytes(one.to_bytes()[:200])


def test_the_model_brings_its_reference(registry: Registry, tmp_path: Path) -> None:
    greys = np.linspace(0.4, 0.6, 40)
    reference = Reference.fit(np.stack([greys, greys**2], axis=1), [f"OST-{at}" for at in range(40)])
    model = Model.load(registry, tiny_model.shelve(registry, tmp_path, reference=reference), threads=1)
    assert model.reference is not None
    _, features = model.predict(np.stack([np.full((1, 32, 32), grey, np.float32) for grey in (0.5, 1.0)]))
    assert Reference.from_bytes(model.reference).is_outlier(features).tolist() == [False, True]
