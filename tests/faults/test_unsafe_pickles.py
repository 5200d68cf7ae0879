"""Files that try to run code, given to every option that takes a file: nothing runs, and no traceback is shown."""

from __future__ import annotations

import os
import pickle
import re
import typing
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image

from tests.caches import make_cache, pixel_recipe
from xar_cli.checkpoint import write_checkpoint
from xar_cli.cli.app import app, main
from xar_cli.config import Config, dump_config, load_recipe
from xar_cli.evaluate.inception import InceptionV3
from xar_cli.run_dir import RunDir
from xar_cli.weights.published import our_shapes, published_shapes


class Touches:
    """Opened carelessly, a pickle of this makes the file `trace`."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


@pytest.fixture
def trace(tmp_path) -> Path:
    """The file that must never appear."""
    return tmp_path / "trace"


@pytest.fixture
def bad_files(tmp_path, trace) -> dict[str, Path]:
    """One hostile file of every kind that Python people exchange."""
    bad = Touches(trace)
    files = {name: tmp_path / f"bad.{name}" for name in ("pth", "old", "pickle", "npz", "npy", "yaml")}
    content = {"model": {"w": torch.zeros(1)}, "args": bad}
    torch.save(content, files["pth"])
    torch.save(content, files["old"], _use_new_zipfile_serialization=False)
    files["pickle"].write_bytes(pickle.dumps(bad))
    objects = np.array([bad], dtype=object)
    np.savez(files["npz"], arr_0=objects, mu=objects, sigma=objects, moments=objects, moments_flip=objects)
    np.save(files["npy"], objects)
    files["yaml"].write_text(f'name: !!python/object/apply:os.system ["touch {trace}"]\n')
    mar = tmp_path / "mar" / "n01440764"
    mar.mkdir(parents=True)
    (mar / "image.npz").write_bytes(files["npz"].read_bytes())
    files["mar"] = mar.parent
    files["script"] = tmp_path / "script.pt"
    with zipfile.ZipFile(files["script"], "w") as archive:  # what makes a TorchScript archive, with a pickle for data
        archive.writestr("a/version", "3\n")
        archive.writestr("a/code/__torch__.py", "")
        archive.writestr("a/constants.pkl", pickle.dumps((), 2))
        archive.writestr("a/data.pkl", pickle.dumps(bad, 2))
    files["run"] = bad_run(tmp_path / "run", bad)
    return files


def bad_run(root: Path, bad: object) -> Path:
    """A run folder whose checkpoint holds pickles where tensors should be, with checksums that are right."""
    run = RunDir(root)
    root.mkdir()
    run.config.write_text(dump_config(load_recipe("tiny")))
    folder = write_checkpoint(run, 1, {"model": {}, "ema-0.995": {}, "optimizer": {}}, {})
    state = (folder / "state.json").read_text()
    for group in ("model", "ema-0.995", "optimizer"):
        old = (folder / f"{group}.safetensors").read_bytes()
        torch.save(bad, folder / f"{group}.safetensors")
        new = (folder / f"{group}.safetensors").read_bytes()
        state = state.replace(str(zlib.crc32(old)), str(zlib.crc32(new))).replace(
            f'"bytes": {len(old)}', f'"bytes": {len(new)}'
        )
    (folder / "state.json").write_text(state)
    return root


# (command line, kinds of file that take the place of FILE). OUT is a folder that does not exist, the other words
# in capitals are good files.
PICKLES = ("pth", "old", "pickle")
CASES = [
    ("weights info FILE", (*PICKLES, "run")),
    ("weights info FILE --raw", (*PICKLES, "run")),
    ("weights info GOOD --recipe FILE", ("yaml",)),
    ("weights convert FILE OUT/out.safetensors", (*PICKLES, "run")),
    ("weights convert GOOD OUT/out.safetensors --recipe FILE", ("yaml",)),
    ("weights push FILE me/mine --dry-run", (*PICKLES, "run")),
    ("weights push GOOD me/mine --results FILE --dry-run", ("pickle",)),
    ("sample --weights FILE --recipe tiny --out OUT", PICKLES),
    ("sample --weights GOOD --recipe FILE --out OUT", ("yaml",)),
    ("sample --run FILE --out OUT", ("run",)),
    ("sample --run RUN --class 0 --tokenizer-weights FILE --count 1 --out OUT", PICKLES),
    ("train --recipe FILE --dry-run", ("yaml",)),
    ("train --recipe tiny --data FILE --out OUT", (*PICKLES, "npz")),
    ("train --recipe PIXELS --data LATENTS --out OUT --init-from FILE", (*PICKLES, "run")),
    ("cache-latents --recipe base --images IMAGES --out OUT/l.h5 --tokenizer-weights FILE", PICKLES),
    ("cache-latents --recipe FILE --images IMAGES --out OUT/l.h5", ("yaml",)),
    ("cache-latents --recipe base --from-mar FILE --out OUT/l.h5", ("mar",)),
    ("cache-latents --recipe tiny --images FILE --out OUT/l.h5", ("pickle", "mar")),
    ("cache-latents info FILE", PICKLES),
    ("cache-latents verify FILE", PICKLES),
    ("cache-latents verify LATENTS --recipe FILE", ("yaml",)),
    ("cache-latents verify LATENTS --recipe base --tokenizer-weights FILE", PICKLES),
    ("fid --samples FILE --reference IMAGES --protocol digits", ("npz", "npy", *PICKLES)),
    ("fid --samples IMAGES --reference FILE --protocol digits", ("npz", "npy", *PICKLES)),
    ("fid --samples IMAGES --reference IMAGES --protocol adm --inception-weights FILE", PICKLES),
    ("fid --samples IMAGES --reference IMAGES --protocol clean-fid --inception-weights FILE", ("script",)),
    ("fid --run FILE --reference IMAGES --protocol digits", ("run",)),
    ("fid --run RUN --reference IMAGES --protocol digits --tokenizer-weights FILE", PICKLES),
    ("fid stats FILE --out OUT/stats.npz --protocol digits", ("npz", "npy", *PICKLES)),
    ("fid stats IMAGES --out OUT/stats.npz --protocol adm --inception-weights FILE", PICKLES),
    ("fid sweep --run FILE --reference IMAGES --protocol digits", ("run",)),
    ("fid sweep --run TINY_RUN --reference FILE --protocol digits --count 2", ("npz", "npy", *PICKLES)),
    ("fid sweep --run RUN --reference IMAGES --protocol digits --tokenizer-weights FILE --count 2", PICKLES),
    (
        "fid sweep --run TINY_RUN --reference IMAGES --protocol adm --inception-weights FILE --count 2",
        PICKLES,
    ),
]
# Inception runs before VGG16 is opened: half a minute.
SLOW = (
    "fid --samples IMAGES --reference IMAGES --protocol torch-fidelity "
    "--inception-weights INCEPTION --vgg16-weights FILE"
)
# These say what they find, and need not mind what it is.
ONLY_LOOKING = [
    ("fid doctor --inception-weights FILE", (*PICKLES, "script")),
    ("fid doctor --vgg16-weights FILE", PICKLES),
    ("status FILE", ("run",)),
]


def all_cases() -> Iterator[object]:
    for line, kinds in [*CASES, *ONLY_LOOKING]:
        for kind in kinds:
            yield pytest.param(line, kind, id=f"{line} ({kind})")
    yield pytest.param(SLOW, "pth", id=SLOW, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def good_files(tmp_path_factory) -> dict[str, str]:
    """Harmless files for the other options of a command: hollow weights, runs, a latent cache, two small images."""
    folder = tmp_path_factory.mktemp("good")
    torch.save(hollow(published_shapes(load_recipe("base"))), folder / "good.pth")
    inception = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    torch.save(hollow(inception), folder / "inception.pth")
    (folder / "images" / "0").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(folder / "images" / "0" / name)
    good_run(folder / "run", load_recipe("base", ["model.dim=16", "model.depth=1", "model.heads=2"]))
    good_run(folder / "tiny_run", load_recipe("tiny", ["sample.num_steps=1"]))
    make_cache(folder / "latents.h5")
    (folder / "pixels.yaml").write_text(dump_config(pixel_recipe("data.mirror=true", "train.global_batch_size=8")))
    names = {
        "LATENTS": "latents.h5",
        "PIXELS": "pixels.yaml",
        "GOOD": "good.pth",
        "INCEPTION": "inception.pth",
        "IMAGES": "images",
        "TINY_RUN": "tiny_run",
        "RUN": "run",
    }
    return {word: str(folder / name) for word, name in names.items()}


def hollow(shapes: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Tensors of any size over one stored number each."""
    return {name: torch.ones(1).expand(*shape) if len(shape) else torch.tensor(1) for name, shape in shapes.items()}


def good_run(root: Path, config: Config) -> None:
    """A run folder with one harmless checkpoint."""
    run = RunDir(root)
    root.mkdir()
    run.config.write_text(dump_config(config))
    tensors = {name: torch.zeros(shape) for name, shape in our_shapes(config).items()}
    write_checkpoint(run, 1, {"model": tensors, f"ema-{config.train.ema_decays[0]:g}": tensors}, {})


@pytest.mark.parametrize(("line", "kind"), list(all_cases()))
def test_nothing_runs(line, kind, bad_files, good_files, trace, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    places = {"FILE": str(bad_files[kind]), "OUT": str(tmp_path / "out"), **good_files}
    words = re.compile("|".join(places))
    arguments = [words.sub(lambda match: places[match[0]], word) for word in line.split()]
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    captured = capsys.readouterr()
    assert not trace.exists(), "the file ran its code"
    assert "Traceback" not in captured.err
    if any(line == known for known, _ in ONLY_LOOKING):
        return
    assert leave.value.code in (1, 2), captured.out
    assert "error:" in captured.err
    assert places["FILE"] in captured.err, "it was refused for another reason"


def test_the_files_are_as_bad_as_they_claim_to_be(bad_files, trace):
    """Each of them, opened carelessly, does leave its trace: so its absence above means something."""
    import yaml

    openers = {
        "pth": lambda path: torch.load(path, weights_only=False),
        "old": lambda path: torch.load(path, weights_only=False),
        "pickle": lambda path: pickle.loads(path.read_bytes()),
        "npz": lambda path: np.load(path, allow_pickle=True)["mu"],
        "npy": lambda path: np.load(path, allow_pickle=True),
        "yaml": lambda path: yaml.unsafe_load(path.read_text()),
    }
    for kind, careless in openers.items():
        trace.unlink(missing_ok=True)
        careless(bad_files[kind])
        assert trace.exists(), kind


# Parameters that take a path but never read one: what they name is written.
WRITTEN = {"out", "save", "report", "feature_cache", "explain"}
READ_TEXTS = {"weights", "recipe", "source", "init_from"}


def test_no_option_that_reads_a_file_is_left_out():
    """Every option that reads a file appears in a line above, and every argument in a line of its own command."""
    lines = [SLOW, *(line for line, _ in [*CASES, *ONLY_LOOKING])]
    left_out = []
    for command, name, option in reading_parameters():
        wanted = f"{option} FILE" if option.startswith("-") else f"{command} FILE"
        if not any(wanted in line for line in lines):
            left_out.append(f"xar {command} {option} ({name})")
    assert left_out == []


def reading_parameters() -> Iterator[tuple[str, str, str]]:
    """(command, parameter, its option or argument) of every parameter that names a file to read."""
    group = typer.main.get_command(app)

    def walk(command: typing.Any, path: list[str]) -> Iterator[tuple[str, str, str]]:
        hints = typing.get_type_hints(command.callback) if command.callback else {}
        for parameter in command.params:
            is_path = "Path" in str(hints.get(parameter.name, ""))
            reads = parameter.name in READ_TEXTS or (is_path and parameter.name not in WRITTEN)
            if reads:
                yield " ".join(path), parameter.name, parameter.opts[0]
        for name, sub in getattr(command, "commands", {}).items():
            yield from walk(sub, [*path, name])

    yield from walk(group, [])
