"""Known traps of the libraries, each held where it would bite. Others are held beside what they concern.

In test_inception.py: float64 that is float32, the layer and order of sFID, the two resizes, free unpickling. In
test_metrics.py: the order of ADM's IS, precision and recall swapped. In test_weights.py: weights from /tmp, no
hash. In test_evaluation.py and test_reference.py: ADM's statistics with clean-fid, counts in names, float32
statistics.
"""

from __future__ import annotations

import ast
from pathlib import Path

import cleanfid
import numpy as np
import pytest
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torch_fidelity.utils import DEFAULT_FEATURE_EXTRACTOR

import xar_cli.evaluate
from tests.unit.evaluate.conftest import make_images, write_folder
from tests.unit.evaluate.test_frechet import features, gaussian
from xar_cli.evaluate import Settings, evaluate
from xar_cli.evaluate.frechet import Gaussian, frechet_distance
from xar_cli.evaluate.protocols import PROTOCOLS

PACKAGE = Path(xar_cli.evaluate.__file__).parent


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_torch_fidelity_reads_no_statistics_file() -> None:
    """The option of that name exists in a fork only; so statistics are read by us."""
    assert "fid_statistics_file" not in DEFAULTS


def test_torch_fidelity_refuses_statistics_of_two_types_and_we_do_not() -> None:
    one, two = gaussian(features(50, 6)), gaussian(features(50, 6, 1))
    single = {"mu": one.mu.astype(np.float32), "sigma": one.sigma.astype(np.float32)}
    with pytest.raises(AssertionError):
        fid_statistics_to_metric(single, {"mu": two.mu, "sigma": two.sigma}, verbose=False)
    found = frechet_distance(Gaussian(single["mu"], single["sigma"]), two)
    assert found == pytest.approx(frechet_distance(one, two), rel=1e-4)


def test_torch_fidelitys_precision_is_vgg16_and_adms_is_inception() -> None:
    assert DEFAULT_FEATURE_EXTRACTOR["prc"] == "vgg16"
    assert PROTOCOLS["torch-fidelity"].precision_network == "vgg16"
    assert PROTOCOLS["adm"].precision_network == "inception"
    assert PROTOCOLS["adm"].max_reference == 10_000


def test_nothing_here_calls_scipy_or_clean_fids_downloads() -> None:
    """scipy 1.18 dropped sqrtm(disp=...), which clean-fid calls; its builders fetch into /tmp in silence."""
    for path in PACKAGE.glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("scipy", "cleanfid")}, path


def test_nothing_is_written_into_site_packages(tmp_path, fake_networks) -> None:
    """clean-fid keeps custom statistics inside its own package."""
    home = Path(cleanfid.__file__).parent
    before = sorted(home.rglob("*.npz"))
    folder = write_folder(tmp_path / "images", make_images(6))
    evaluate(folder, folder, "clean-fid", settings=Settings(error_bars="none"))
    assert sorted(home.rglob("*.npz")) == before
