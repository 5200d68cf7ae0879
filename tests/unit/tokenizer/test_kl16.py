"""KL-16's files: the same weights from every kind of file, and a refusal that names what does not fit."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from tests.seeded import kl16_shapes, kl16_state
from xar_cli.config import load_recipe
from xar_cli.errors import UserError
from xar_cli.tokenizer import load_tokenizer
from xar_cli.tokenizer.kl16 import build_on_meta, from_diffusers, group_norm, identity_of, load_kl16, read_kl16_state

CPU = torch.device("cpu")


def hollow_state() -> dict[str, torch.Tensor]:
    """All names and shapes of KL-16 over a single stored zero each: a file of a few kilobytes."""
    return {name: torch.zeros(1).expand(shape) for name, shape in kl16_shapes().items()}


def to_diffusers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of diffusers' AutoencoderKL, written out here once more, from the other side."""
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[1] in ("down", "up"):
            level = int(parts[2]) if parts[1] == "down" else 4 - int(parts[2])
            kind = {
                "block": ["resnets"],
                "attn": ["attentions"],
                "downsample": ["downsamplers", "0"],
                "upsample": ["upsamplers", "0"],
            }[parts[3]]
            parts = [parts[0], f"{parts[1]}_blocks", str(level), *kind, *parts[4:]]
        elif parts[1] == "mid":
            kind = {"block_1": ["resnets", "0"], "attn_1": ["attentions", "0"], "block_2": ["resnets", "1"]}[parts[2]]
            parts = [parts[0], "mid_block", *kind, *parts[3:]]
        attention = "attentions" in parts
        words = {"nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out"}
        if attention:
            words |= {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
            if tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]
        renamed[".".join(words.get(part, part) for part in parts)] = tensor.contiguous()
    return renamed


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kl16")
    torch.save({"model": kl16_state(), "epoch": 3}, folder / "kl16.ckpt")
    save_file(to_diffusers(kl16_state()), folder / "diffusers.safetensors")
    yield folder
    for file in folder.iterdir():
        file.unlink()


def test_checkpoint_and_diffusers_safetensors_give_one_tokenizer(files):
    ckpt, diffusers = (load_kl16(files / name, CPU) for name in ("kl16.ckpt", "diffusers.safetensors"))
    assert ckpt.identity == diffusers.identity
    theirs = diffusers.network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ckpt.network.state_dict().items())
    assert torch.equal(theirs["encoder.down.4.attn.1.q.weight"], kl16_state()["encoder.down.4.attn.1.q.weight"])
    assert not ckpt.network.training


def test_older_diffusers_names_of_attention():
    state = {"decoder.mid_block.attentions.0.query.weight": torch.zeros(512, 512)}
    expected = {"decoder.mid.attn_1.q.weight": torch.Size([512, 512, 1, 1])}
    assert {name: tensor.shape for name, tensor in from_diffusers(state, expected).items()} == expected


def test_identity_is_of_the_weights_and_not_of_the_file():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    by_hand = hashlib.sha256(b"a (2,)\n" + one.numpy().tobytes() + b"b (1, 1)\n" + two.numpy().tobytes()).hexdigest()
    assert identity_of({"b": two, "a": one}) == f"kl16:{by_hand}"
    assert identity_of({"b": two, "a": one + 1}) != f"kl16:{by_hand}"


def test_bfloat16_stays_near_float32(files):
    config = load_recipe("base")
    exact = load_tokenizer(config, files / "kl16.ckpt", CPU)
    fast = load_tokenizer(config, str(files / "kl16.ckpt"), CPU, "bf16")
    assert fast.identity == exact.identity
    latents = torch.randn(2, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    expected, got = exact.decode(latents), fast.decode(latents)
    assert got.dtype == torch.float32
    assert got.shape == (2, 3, 32, 32)
    assert (got - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_from_the_moments_of_channels(dtype):
    norm = torch.nn.GroupNorm(32, 128, eps=1e-6)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (3 * torch.randn(2, 128, 9, 7) + 20).to(dtype)
    torch.testing.assert_close(group_norm(norm, x), norm(x.float()), rtol=1e-4, atol=1e-4)


def test_compiled_halves_give_the_same_numbers(files, monkeypatch):
    """Traced whole; a batch of another size is not compiled again."""
    torch._dynamo.reset()
    whole, traced = torch.compile, []

    def compiler(graph, inputs):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: whole(f, dynamic=dynamic, backend=compiler, fullgraph=True)
    )
    exact, compiled = (load_kl16(files / "kl16.ckpt", CPU) for _ in range(2))
    compiled.compile("encode"), compiled.compile("decode")
    generator = torch.Generator().manual_seed(0)
    images, latents = (
        torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1,
        torch.randn(3, 16, 1, 1, generator=generator),
    )
    for count in (2, 2, 3, 1):
        torch.testing.assert_close(compiled.encode(images[:count]), exact.encode(images[:count]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            compiled.decode(latents[:count]), exact.decode(latents[:count]), rtol=1e-4, atol=1e-4
        )
    assert len(traced) == 2


def test_a_long_job_on_a_gpu_is_compiled(files, monkeypatch):
    kl16, compiled = load_kl16(files / "kl16.ckpt", CPU), []
    monkeypatch.setattr(kl16, "compile", compiled.append)
    for device in ("cpu", "cuda"):
        kl16.device = torch.device(device)
        for half in ("encode", "decode"):
            for images in (1_000, 100_000):
                kl16.expect(half, images * 256**2)
    assert compiled == ["encode", "decode"]


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_what_only_a_gpu_has_is_refused_on_a_cpu(files, precision):
    with pytest.raises(UserError, match=f"KL-16 in {precision} needs a GPU. Use fp32 or bf16"):
        load_tokenizer(load_recipe("base"), files / "kl16.ckpt", CPU, precision)


def test_an_oblong_image_goes_through_with_its_own_grid(files):
    kl16 = load_kl16(files / "kl16.ckpt", CPU)
    image = torch.rand(1, 3, 16, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = kl16.encode(image)
    assert moments.shape == (1, 32, 1, 3)
    assert kl16.decode(moments[:, :16]).shape == image.shape


def test_logvar_is_clamped():
    network = build_on_meta().to_empty(device="cpu")
    torch.nn.init.zeros_(network.quant_conv.weight)
    with torch.no_grad():
        network.quant_conv.bias.copy_(torch.arange(-48, 48, 3))
        network.encoder = torch.nn.Conv2d(3, 32, 1)  # the clamp does not depend on what comes before
        moments = network.encode(torch.zeros(1, 3, 1, 1)).flatten()
    assert moments[:16].tolist() == list(range(-48, 0, 3))
    assert moments[16:].tolist() == [min(max(value, -30), 20) for value in range(0, 48, 3)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("quant_conv.bias"), ["1 missing: quant_conv.bias"]),
        (lambda s: s.update(loss=torch.zeros(1)), ["1 unknown: loss"]),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(8)}),
            ["1 misshapen: quant_conv.bias is (8), not (32)"],
        ),
        (
            lambda s: s.update({"quant_conv.bias": torch.zeros(32, dtype=torch.int8)}),
            ["1 unusable: quant_conv.bias is int8"],
        ),
        (lambda s: [s.pop(name) for name in list(s)[:10]], ["10 missing", "and 7 more"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path, change, said):
    state = hollow_state()
    change(state)
    torch.save({"model": state}, tmp_path / "other.ckpt")
    with pytest.raises(UserError) as error:
        read_kl16_state(tmp_path / "other.ckpt")
    assert all(text in error.value.message for text in said)


def test_a_hollow_file_of_the_right_shapes_is_read(tmp_path):
    torch.save(hollow_state(), tmp_path / "bare.pth")
    assert len(read_kl16_state(tmp_path / "bare.pth")) == len(kl16_shapes())


def test_what_is_loaded_does_not_change_with_its_file(tmp_path):
    """A part of a mapped file follows the file, or ends the process where that was cut short."""
    state = {name: torch.ones(shape) for name, shape in kl16_shapes().items() if len(shape) == 1}
    path = tmp_path / "kl16.ckpt"
    torch.save(hollow_state() | state, path)
    kl16 = load_kl16(path, CPU)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(kl16.network.get_parameter(name), tensor) for name, tensor in state.items())


def test_missing_weights_say_where_to_get_them_and_which_option():
    with pytest.raises(UserError) as error:
        load_tokenizer(load_recipe("base"), None, CPU)
    assert "kl16.ckpt" in error.value.message
    assert "huggingface.co" in error.value.next_step
    assert "--tokenizer-weights" in error.value.next_step


def test_pixels_refuse_weights():
    with pytest.raises(UserError, match="has no weights"):
        load_tokenizer(load_recipe("tiny"), "kl16.ckpt", CPU)


def test_tiny_recipe_gets_its_pixels():
    config = load_recipe("tiny", ["tokenizer.patch=2"])
    assert load_tokenizer(config, None, CPU).identity == "pixels/p2"
