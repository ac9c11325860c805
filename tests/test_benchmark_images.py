"""The benchmark on images reads, corrupts and augments rightly, resumes bit for bit, and runs with every method."""

from __future__ import annotations

import gzip
import json
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import images  # noqa: E402
import images_data  # noqa: E402
import images_methods  # noqa: E402
import images_report  # noqa: E402
import images_training  # noqa: E402
from images_data import CORRUPTIONS, Images, augmented, corrupted  # noqa: E402

TRAINERS = [name for name in images_methods.TRAINERS if name != "ivon" or find_spec("ivon")]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Three data sets of 60 and 40 bright or dark images, and small networks."""
    generator = np.random.default_rng(0)
    for name in ("mnist", "fashion_mnist", "notmnist"):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        for part, count in (("train", 60), ("t10k", 40)):
            labels = generator.integers(0, 10, count)
            pixels = generator.integers(0, 20, (count, 28, 28)) + 23 * labels[:, None, None]
            write_idx(folder / f"{part}-images-idx3-ubyte.gz", pixels)
            write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("BAYES_KFAC_CACHE", str(tmp_path / "cache"))
    images_data.read.cache_clear()

    def small() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(1, 2, 7, stride=7), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10)
        )

    monkeypatch.setitem(images_training.NETWORKS, "mlp", small)
    yield tmp_path
    images_data.read.cache_clear()


# -- data -------------------------------------------------------------------------------------------------------------


def test_idx_files_are_read_as_they_were_written(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 4, 5))
    write_idx(tmp_path / "file.gz", values)
    assert images_data.read_idx(str(tmp_path / "file.gz")).tolist() == values.tolist()


def test_cifar_is_decoded_from_its_differences(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8)).astype(np.uint8)
    planes = pixels.transpose(1, 0, 2, 3).copy()
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    delta = np.diff(np.diff(planes, axis=3, prepend=np.uint8(0)), axis=2, prepend=np.uint8(0))
    np.savez(tmp_path / "differences.npz", delta=delta, labels=np.arange(6))
    np.savez(tmp_path / "plain.npz", images=pixels, labels=np.arange(6))
    for name in ("differences", "plain"):
        found = images_data.read_cifar(tmp_path / f"{name}.npz")
        assert np.array_equal(found.pixels.numpy(), pixels)
        assert found.labels.tolist() == list(range(6))


def test_missing_data_is_one_clear_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYES_KFAC_DATA", str(tmp_path))
    monkeypatch.setattr(images_data, "HERE", tmp_path / "elsewhere" / "benchmarks")
    with pytest.raises(SystemExit, match="set BAYES_KFAC_DATA"):
        images_data.folder("mnist")


def test_every_augmented_image_is_a_piece_of_the_padded_one_or_its_mirror_image():
    pixels = torch.randint(1, 256, (50, 3, 8, 8), dtype=torch.uint8)
    found = augmented(pixels, torch.Generator().manual_seed(0), padding=2)
    padded = nn.functional.pad(pixels, (2, 2, 2, 2))
    seen = set()
    for number, image in enumerate(found):
        matches = [
            (row, column, mirrored)
            for row in range(5)
            for column in range(5)
            for mirrored in (False, True)
            if torch.equal(image.flip(-1) if mirrored else image, padded[number, :, row : row + 8, column : column + 8])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 25  # places and mirroring do vary


def test_grey_images_are_resized_and_repeated():
    like = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    found = images_data.as_format(torch.full((2, 1, 28, 28), 200, dtype=torch.uint8), like)
    assert found.shape == (2, 3, 32, 32)
    assert bool((found == 200).all())


# -- corruptions ------------------------------------------------------------------------------------------------------

X = torch.rand(40, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def random() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def test_noise_has_its_standard_deviation():
    assert (images_data.noise(X, 0.2, random()) - X).std().item() == pytest.approx(0.2, rel=0.03)


def test_a_blur_is_the_convolution_with_a_gaussian_and_keeps_what_is_even():
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1.0
    steps = torch.arange(-10, 11.0)
    expected = torch.exp(-(steps[:, None] ** 2 + steps**2) / (2 * 1.5**2))
    torch.testing.assert_close(
        images_data.blur(point, 1.5, random())[0, 0], expected / expected.sum(), atol=1e-4, rtol=0
    )
    even = torch.full((1, 3, 12, 12), 0.3)
    torch.testing.assert_close(images_data.blur(even, 2.0, random()), even)


def test_contrast_keeps_the_mean_and_scales_the_rest():
    found = images_data.contrast(X, 0.3, random())
    torch.testing.assert_close(found.mean((1, 2, 3)), X.mean((1, 2, 3)))
    torch.testing.assert_close(found.std((1, 2, 3)), 0.3 * X.std((1, 2, 3)))


def test_a_rotation_by_a_right_angle_is_exact_to_both_sides():
    found = images_data.rotation(X, 90.0, random())
    turns = [
        [torch.allclose(image, original.rot90(k, (1, 2)), atol=1e-5) for k in (-1, 1)]
        for image, original in zip(found, X, strict=True)
    ]
    assert all(sum(turn) == 1 for turn in turns)
    assert {turn.index(True) for turn in turns} == {0, 1}


def test_a_translation_moves_all_pixels_along_both_axes():
    found = images_data.translation(X, 3.0, random())
    seen = set()
    for image, original in zip(found, X, strict=True):
        padded = nn.functional.pad(original, (3, 3, 3, 3))
        places = [(r, c) for r in (0, 6) for c in (0, 6) if torch.equal(image, padded[:, r : r + 12, c : c + 12])]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) == 4


def test_pixelation_to_half_the_size_is_the_mean_of_four_pixels():
    found = images_data.pixelation(X, 0.5, random())
    means = X.reshape(40, 3, 6, 2, 6, 2).mean((3, 5))
    torch.testing.assert_close(found, means.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_are_reproducible_and_grow_with_severity(kind):
    pixels = (255 * nn.functional.interpolate(X, (28, 28), mode="bilinear")).to(torch.uint8)
    changes = [
        (corrupted(pixels, kind, severity).float() - pixels.float()).square().mean().item() for severity in (1, 3, 5)
    ]
    assert 0 < changes[0] < changes[2]
    assert torch.equal(corrupted(pixels, kind, 3), corrupted(pixels, kind, 3))
    assert corrupted(pixels, kind, 3).shape == pixels.shape


# -- training and the command -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", TRAINERS)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(toy, monkeypatch, method):
    problem = images_training.Problem("mnist", "mlp", 2, 16)
    data = images_training.parts(problem)

    def run(checkpoint):
        return images_training.train(problem, method, 3, data, epochs=2, device="cpu", checkpoint=checkpoint)

    whole, save = run(None), images_training.save

    def stop(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(images_training, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            run(toy / "run.pt")
    resumed = run(toy / "run.pt")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert [one["nll"] for one in resumed.curve] == [one["nll"] for one in whole.curve]


def test_a_checkpoint_of_other_settings_is_not_taken(toy):
    problem = images_training.Problem("mnist", "mlp", 1, 16)
    data = images_training.parts(problem)

    def run(lr, checkpoint):
        options = {"epochs": 1, "device": "cpu", "checkpoint": checkpoint, "settings": {"lr": lr}}
        return images_training.train(problem, "sgd", 0, data, **options).curve[0]["nll"]

    run(0.1, toy / "run.pt")
    assert run(0.3, toy / "run.pt") == run(0.3, None)


def test_held_out_images_are_the_last_of_the_training_part(toy):
    problem = images_training.Problem("mnist", "mlp", 2, 16)
    data, whole = images_training.parts(problem, holdout=10), images_training.parts(problem)
    assert torch.equal(torch.cat([data.train.pixels, data.held_out.pixels]), whole.train.pixels)
    assert len(data.held_out) == 10


def test_the_command_runs_every_method_and_the_section_shows_them(toy, monkeypatch, capsys):
    problem = images_training.Problem("mnist", "mlp", 2, 16)
    monkeypatch.setitem(images_training.PROBLEMS, "mnist-mlp", problem)
    monkeypatch.setattr(images, "CORRUPTED_IMAGES", 10)
    monkeypatch.setattr(images_report, "RESULTS", toy / "results" / "images")
    monkeypatch.setattr(images_report, "PICTURES", toy / "pictures")
    arguments = ["images.py", "--problems", "mnist-mlp", "--seeds", "2", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*arguments, "--results", str(toy / "results")])
    images.main()
    capsys.readouterr()
    names = {path.stem for path in (toy / "results" / "images" / "mnist-mlp").glob("*.json")}
    expected = {f"{name}-{seed}" for name in (*TRAINERS, images.LONG, *images.LAPLACE) for seed in range(2)}
    assert names == expected | {f"adamw-{seed}" for seed in range(images.MEMBERS)} | {"ensemble-0"}
    kept = json.loads((toy / "results" / "images" / "mnist-mlp" / "noisy_kfac-0.json").read_text())
    assert set(kept["further"]) == {"mean", "linearized"}
    assert [len(kept["corrupted"][kind]) for kind in CORRUPTIONS] == [5] * len(CORRUPTIONS)
    assert len(kept["curve"]) == 2
    assert str(toy) not in json.dumps(kept)  # no path of the machine is kept
    text = images_report.section()
    for method in (*TRAINERS, images.LONG, "ensemble", *images.LAPLACE):
        assert f"| {method} |" in text
    assert "nan" not in text
    assert {path.name for path in (toy / "pictures").iterdir()} == {
        "images_curves.png",
        "images_reliability.png",
        "images_corruption.png",
    }


@pytest.mark.parametrize("network", ["vgg16", "vgg16_bn", "resnet18"])
def test_deep_networks_go_through_with_every_method(tmp_path, monkeypatch, network):
    """With batch normalisation and without, narrow here; colours, augmentation and all."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"cifar10": (3, 32, 32), "notmnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}

    def read(name, part):
        del part
        pixels = torch.randint(256, (6, *shapes[name]), dtype=torch.uint8, generator=generator)
        return Images(pixels, torch.arange(6))

    for module in (images, images_training):
        monkeypatch.setattr(module, "read", read)
    monkeypatch.setattr(images, "CORRUPTED_IMAGES", 2)
    monkeypatch.setattr(images, "CORRUPTIONS", {"noise": None})
    monkeypatch.setattr(images_methods, "DRAWS", 3)
    monkeypatch.setattr(images, "MEMBERS", 2)
    monkeypatch.setenv("BAYES_KFAC_CACHE", str(tmp_path))
    monkeypatch.setitem(images_training.NETWORKS, network, partial(images_training.NETWORKS[network], 2))
    monkeypatch.setitem(
        images_training.PROBLEMS, "toy", images_training.Problem("cifar10", network, 1, 6, augment=True)
    )
    # so few images leave IVON's draws, as it is set, so far apart that their logits overflow
    narrow = {"ivon": {**images_methods.SETTINGS[network]["ivon"], "hess_init": 1e3}}
    monkeypatch.setitem(images_methods.SETTINGS, network, {**images_methods.SETTINGS[network], **narrow})
    for method in (*TRAINERS[2:], "ensemble", *images.LAPLACE):
        result = images.work("toy", method, 0, 1, "cpu")
        assert np.isfinite(result["test"]["nll"]), method
        assert len(result["corrupted"]["noise"]) == 5


def test_tuning_tries_as_many_settings_of_every_method_and_looks_at_no_test_image(toy, monkeypatch):
    import images_tuning

    assert {np.prod([len(values) for values in grid.values()]) for grid in images_tuning.GRIDS.values()} == {24}
    read = images_training.read

    def read_train_only(name, part):
        found = read(name, part)
        return Images(found.pixels[:0], found.labels[:0]) if part == "test" else found

    monkeypatch.setattr(images_training, "read", read_train_only)
    monkeypatch.setattr(images_tuning, "HOLDOUT", 10)
    found = images_tuning.work("mnist-mlp", "sgd", {"lr": 0.2}, 1, "cpu")
    assert found["settings"]["lr"] == 0.2
    assert len(found["curve"]) == 1


def test_the_best_of_each_regularisation_is_trained_at_full_length(toy, monkeypatch, capsys):
    import images_tuning

    monkeypatch.setitem(images_training.PROBLEMS, "mnist-mlp", images_training.Problem("mnist", "mlp", 2, 16))
    monkeypatch.setattr(images_tuning, "HOLDOUT", 10)
    monkeypatch.setattr(images_tuning, "GRIDS", {"sgd": {"lr": [1e-3, 0.1, 1e30], "weight_decay": [0.0, 0.1]}})
    results = toy / "results"
    arguments = ["--problem", "mnist-mlp", "--methods", "sgd", "--epochs", "1", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["images_tuning.py", *arguments, "--results", str(results)])
    images_tuning.main()
    folder = results / "images" / "tuning" / "mnist-mlp" / "sgd"
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(found) == 6
    assert found["lr=1e+30_weight_decay=0"]["diverged"]
    best = sorted(found, key=lambda name: images_tuning.loss(found[name]))
    finals = {path.stem: json.loads(path.read_text()) for path in (folder / "full").glob("*.json")}
    assert set(finals) == {
        next(name for name in best if name.endswith(f"weight_decay={value}")) for value in ("0", "0.1")
    }
    assert {len(one["curve"]) for one in finals.values()} == {2}
    first = min(finals, key=lambda name: images_tuning.loss(finals[name]))
    assert f"'lr': {finals[first]['settings']['lr']}" in capsys.readouterr().out.splitlines()[0]
    monkeypatch.setattr(images_report, "RESULTS", results / "images")
    assert f"| mnist-mlp | sgd | 6, 2 | {images_tuning.loss(found[best[0]]):.3f} |" in images_report.tuning_table()


def test_long_runs_have_the_length_of_their_problem_and_no_grid(toy, monkeypatch):
    import images_tuning

    monkeypatch.setitem(images_training.PROBLEMS, "mnist-mlp", images_training.Problem("mnist", "mlp", 2, 16))
    monkeypatch.setattr(images_tuning, "HOLDOUT", 10)
    monkeypatch.setattr(images_tuning, "LONG", {"mnist-mlp": {"sgd": [{"weight_decay": 0.0}, {"weight_decay": 0.1}]}})
    arguments = ["--problem", "mnist-mlp", "--long", "--device", "cpu", "--results", str(toy / "results")]
    monkeypatch.setattr("sys.argv", ["images_tuning.py", *arguments, "--methods", "sgd"])
    images_tuning.main()
    folder = toy / "results" / "images" / "tuning" / "mnist-mlp"
    found = [json.loads(path.read_text()) for path in folder.glob("*/*.json")]
    assert not found
    found = [json.loads(path.read_text()) for path in (folder / "sgd" / "full").glob("*.json")]
    assert sorted(one["settings"]["weight_decay"] for one in found) == [0.0, 0.1]
    assert {len(one["curve"]) for one in found} == {2}
    monkeypatch.setattr("sys.argv", ["images_tuning.py", *arguments, "--methods", "adamw"])
    with pytest.raises(SystemExit, match=r"Nothing is tried of adamw on mnist-mlp\. Known: sgd"):
        images_tuning.main()


def test_an_ensemble_averages_probabilities():
    models = [nn.Linear(4, 10) for _ in range(3)]
    x = torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8)

    def predict(part):
        return images_methods.of_members(models)(part.flatten(1))

    found = images_training.probabilities(predict, x, "mnist")
    inputs = images_data.standardized(x, "mnist").flatten(1)
    expected = torch.stack([model(inputs).double().softmax(-1) for model in models]).mean(0)
    torch.testing.assert_close(found, expected.detach())


def test_pooled_reliability_weighs_bins_by_their_counts():
    def curve(confidence, accuracy, count):
        return {"test": {"reliability": {"confidence": confidence, "accuracy": accuracy, "count": count}}}

    pooled = images_report.pooled_reliability([curve([0.95, 0.3], [0.9, 0.2], [30, 5]), curve([0.99], [0.5], [10])])
    assert pooled.tolist() == [pytest.approx([0.96, 0.8])]


def test_the_networks_have_the_papers_shapes():
    from images_networks import cnn, mlp, resnet18, vgg16

    assert mlp()(torch.rand(2, 1, 28, 28)).shape == cnn()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    x = torch.rand(2, 3, 32, 32)
    assert vgg16().eval()(x).shape == vgg16(batch_norm=True).eval()(x).shape == resnet18(8).eval()(x).shape == (2, 10)
    widths = [module.out_channels for module in vgg16() if isinstance(module, nn.Conv2d)]
    assert widths == [32] * 2 + [64] * 2 + [128] * 3 + [256] * 6
    assert sum(p.numel() for p in resnet18().parameters()) == 11_173_962  # as the usual one for CIFAR-10


def test_images_are_sliced_and_moved_together():
    own = Images(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), torch.arange(5))
    assert own[1:3].labels.tolist() == [1, 2]
    assert len(own[:2].to("cpu")) == 2
