"""Between pixels and latents: the scale, shift, channels and stride of a VAE, in both directions."""
import re
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder.checks import check_autoencoder
from autoencoder.vae import VAE, CachedLatents, IdentityAutoencoder, latent_size, load_autoencoder
from common.errors import UserError

# diffusers' own call of huggingface_hub
pytestmark = pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks:UserWarning")


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def saved_vae(folder, **config):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    levels = config.pop("levels", 2)
    vae = AutoencoderKL(**dict(
        block_out_channels=(8, 16, 16)[:levels], layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4, scaling_factor=0.5) | config)
    vae.save_pretrained(folder)
    return str(folder)


MEANS, STDS = [0.5, -1.0, 2.0, 0.0], [1.0, 2.0, 0.5, 4.0]
CONFIGS = {
    "scale alone": dict(scaling_factor=0.18215),
    "scale and shift": dict(scaling_factor=0.5, shift_factor=0.25),
    "16 channels": dict(latent_channels=16, scaling_factor=1.5, shift_factor=-0.1),
    "stride 4": dict(levels=3),
    "each channel normalized": dict(scaling_factor=0.5, latents_mean=MEANS, latents_std=STDS),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def case(request, tmp_path):
    """An autoencoder, and its configuration."""
    name = saved_vae(tmp_path / "vae", **request.param)
    defaults = dict(scaling_factor=0.5, latent_channels=4, shift_factor=None, levels=2)
    return load_autoencoder(name), defaults | request.param


def test_sizes_come_from_the_config(case, tmp_path):
    autoencoder, config = case
    assert autoencoder.name == str(tmp_path / "vae")
    assert autoencoder.channels == config["latent_channels"]
    assert autoencoder.stride == 2 ** (config["levels"] - 1)
    assert latent_size(autoencoder, 32) == 32 // autoencoder.stride
    assert autoencoder.is_random


def scale(config):
    return config["scaling_factor"] / (torch.tensor(STDS)[:, None, None] if "latents_std" in config else 1)


def shift(config):
    return torch.tensor(MEANS)[:, None, None] if "latents_mean" in config else config["shift_factor"] or 0


def test_encoding_samples_shifts_and_scales(case):
    """(mean + std noise - shift) scale."""
    autoencoder, config = case
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, autoencoder.channels, 16 // autoencoder.stride, 16 // autoencoder.stride)
    with torch.no_grad():
        posterior = autoencoder.vae.encode(images).latent_dist
    drawn = posterior.mean + posterior.std * noise
    expected = (drawn - shift(config)) * scale(config)
    assert posterior.std.mean() > 0.1  # or the noise would not show
    torch.testing.assert_close(autoencoder.encode(images, noise), expected)


def test_decoding_undoes_scale_and_shift(case):
    autoencoder, config = case
    scaled = torch.randn(2, autoencoder.channels, 4, 4)
    with torch.no_grad():
        expected = autoencoder.vae.decode(scaled / scale(config) + shift(config)).sample
    images = autoencoder.decode(scaled)
    assert images.shape == (2, 3, 4 * autoencoder.stride, 4 * autoencoder.stride)
    torch.testing.assert_close(images, expected)


def test_decoding_inverts_encoding(case):
    autoencoder, _ = case
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = autoencoder.vae.encode(images).latent_dist.mean
        expected = autoencoder.vae.decode(mean).sample
    torch.testing.assert_close(autoencoder.decode(autoencoder.encode(images, torch.zeros_like(mean))), expected)


def test_vae_is_frozen(tmp_path):
    autoencoder = load_autoencoder(saved_vae(tmp_path / "vae"))
    assert not autoencoder.vae.training
    assert not any(weight.requires_grad for weight in autoencoder.vae.parameters())
    images = torch.rand(1, 3, 16, 16, requires_grad=True)
    scaled = autoencoder.encode(images, torch.zeros(1, 4, 8, 8))
    assert not scaled.requires_grad
    assert not autoencoder.decode(scaled.requires_grad_()).requires_grad


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_autoencoder_passes_pixels(channels):
    autoencoder = load_autoencoder("none", channels)
    images = torch.randn(2, channels, 8, 8)
    assert (autoencoder.name, autoencoder.channels, autoencoder.image_channels) == ("none", channels, channels)
    assert autoencoder.stride == 1 and not autoencoder.is_random
    assert torch.equal(autoencoder.encode(images, None), images)
    assert torch.equal(autoencoder.decode(images), images)
    assert latent_size(autoencoder, 7) == 7


def test_cached_moments_give_the_latents_of_the_images(case):
    autoencoder, _ = case
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    noise = torch.randn(2, autoencoder.channels, 16 // autoencoder.stride, 16 // autoencoder.stride)
    moments = autoencoder.moments(images)
    assert moments.shape == (2, 2 * autoencoder.channels, *noise.shape[2:]) and not moments.requires_grad
    cached = CachedLatents("name", autoencoder.latent_scaling, "", autoencoder)
    want = autoencoder.encode(images, noise)
    assert torch.equal(cached.encode(moments, noise), want)
    half = cached.encode(moments.half(), noise)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, want, rtol=2**-9, atol=2**-8)
    assert (cached.channels, cached.stride, cached.is_random) == (autoencoder.channels, autoencoder.stride, True)
    assert torch.equal(cached.decode(want), autoencoder.decode(want))


def test_encoder_hash_depends_on_what_latents_depend_on(tmp_path):
    autoencoder = load_autoencoder(saved_vae(tmp_path / "vae"))
    first = autoencoder.encoder_sha256
    autoencoder.vae.decoder.conv_out.weight.data += 1
    assert autoencoder.encoder_sha256 == first and len(first) == 64
    names = {first}
    for part in (autoencoder.vae.quant_conv, autoencoder.vae.encoder.conv_in):
        part.bias.data[0] += 1e-6
        names.add(autoencoder.encoder_sha256)
    assert len(names) == 3
    bare = load_autoencoder(saved_vae(tmp_path / "bare", use_quant_conv=False, use_post_quant_conv=False))
    assert bare.encoder_sha256 not in names and bare.moments(torch.zeros(1, 3, 8, 8)).shape == (1, 8, 4, 4)


class LinearVAE(torch.nn.Module):
    """An `AutoencoderKL` that restores every image, with latents of a chosen standard deviation."""

    def __init__(self, spread=1.0, offset=0.0, gain=1.0):
        super().__init__()
        self.spread, self.offset, self.gain = spread, offset, gain
        self.config = SimpleNamespace(latent_channels=3, block_out_channels=(1,), in_channels=3, scaling_factor=2.0,
                                      shift_factor=0.5)

    def encode(self, images):
        mean = images * self.spread + self.offset
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=mean, logvar=torch.full_like(mean, -9.0)))

    def decode(self, z):
        return SimpleNamespace(sample=(z - self.offset) / self.spread * self.gain)


def check(**how):
    """Lines on images whose values are spread evenly over [-1, 1] (standard deviation 0.58)."""
    autoencoder = VAE("it", LinearVAE(**how))
    images = torch.linspace(-1, 1, 8 * 3 * 4 * 4)[torch.randperm(384)].view(8, 3, 4, 4)
    return autoencoder, images, list(check_autoencoder(autoencoder, images, "cpu"))


def test_good_vae_gives_no_warning():
    _, _, lines = check(spread=1.0, offset=0.5)
    assert len(lines) == 2 and not any("WARNING" in line for line in lines)
    assert float(re.search(r"PSNR (\S+) dB", lines[0])[1]) > 90
    assert re.search(r"mean -?0\.000, std 1\.159 as scaled", lines[1])


@pytest.mark.parametrize("how, warning", [
    (dict(spread=0.2, offset=0.5), r"standard deviation of 0\.23\d?, .* scaling_factor 2 "),
    (dict(spread=5.0, offset=0.5), r"standard deviation of 5\.8, .* scaling_factor 2 "),
    (dict(spread=1.0, offset=-0.5), r"mean of -2, .* shift_factor 0\.5 "),
    (dict(spread=1.0, offset=0.5, gain=0.5), r"PSNR 16\.8 dB .* 0\.50 times the contrast"),
    (dict(spread=1.0, offset=0.5, gain=3.0), r"PSNR 4\.7 dB .* 3\.00 times the contrast"),
])
def test_wrong_scale_shift_or_range_gives_one_warning(how, warning):
    autoencoder, images, lines = check(**how)
    (warned,) = [line for line in lines if "WARNING" in line]
    assert re.search(warning, warned), warned
    cached = CachedLatents("it", autoencoder.latent_scaling, "")
    lines = list(check_autoencoder(cached, autoencoder.moments(images), "cpu"))
    assert [line for line in lines if "WARNING" in line] == ([] if "gain" in how else [warned])


def test_nothing_is_checked_without_a_vae_or_images():
    assert list(check_autoencoder(IdentityAutoencoder(3), torch.zeros(1, 3, 4, 4), "cpu")) == []
    assert list(check_autoencoder(VAE("it", LinearVAE()), None, "cpu")) == []


def test_image_size_must_be_a_multiple_of_the_stride(tmp_path):
    autoencoder = load_autoencoder(saved_vae(tmp_path / "vae", levels=3))
    with pytest.raises(UserError, match=r"--image-size 30: not a multiple of 4"):
        latent_size(autoencoder, 30)


def test_hub_names_may_end_in_a_folder(monkeypatch):
    from diffusers import AutoencoderKL
    requested = []
    def from_pretrained(name, subfolder=None):
        requested.append((name, subfolder))
        return AutoencoderKL(norm_num_groups=4, block_out_channels=(4,))

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    for name in ("ema", "some/vae", "some/model/vae", "some/model/parts/vae"):
        load_autoencoder(name)
    assert requested == [("stabilityai/sd-vae-ft-ema", None), ("some/vae", None), ("some/model", "vae"),
                     ("some/model", "parts/vae")]


@pytest.mark.parametrize("name, hub_name", [
    ("ema", "stabilityai/sd-vae-ft-ema"), ("mse", "stabilityai/sd-vae-ft-mse"), ("some/vae", "some/vae")])
def test_error_without_a_network_says_what_to_fetch(name, hub_name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=rf"--vae {name}: .*huggingface\.co/{hub_name} elsewhere and pass"):
        load_autoencoder(name)


def test_missing_path_is_not_a_hub_name(tmp_path):
    with pytest.raises(UserError, match=f"--vae {tmp_path}/vae: there is no such folder") as caught:
        load_autoencoder(str(tmp_path / "vae"))
    assert "huggingface.co//" not in str(caught.value)


def without_a_tensor(config, weights):
    state = load_file(weights)
    state.pop("decoder.conv_out.weight")
    save_file(state, weights)


@pytest.mark.parametrize("spoil", [
    lambda config, weights: config.unlink(),
    lambda config, weights: config.write_text("{"),
    lambda config, weights: config.write_text(config.read_text().replace('"latent_channels": 4',
                                                                         '"latent_channels": 8')),
    lambda config, weights: weights.unlink(),
    lambda config, weights: weights.write_bytes(weights.read_bytes()[:5000]),
    without_a_tensor,
], ids=["no config", "broken config", "another config", "no weights", "half the weights", "a tensor missing"])
def test_incomplete_or_damaged_folder_is_refused(tmp_path, spoil):
    folder = tmp_path / "vae"
    saved_vae(folder)
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    spoil(config, weights)
    with pytest.raises(UserError, match=rf"--vae {folder}: .*must hold config\.json") as caught:
        load_autoencoder(str(folder))
    assert "\n" not in str(caught.value)
