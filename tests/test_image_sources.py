"""Image sets in their authors' own formats and by name: the pixels and labels that were written, and bad files."""

import gzip
import hashlib
import io
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nets.image_archives import read_cifar, read_idx
from nets.image_files import read_parquet
from nets.image_sources import SOURCES, File, Source, known_images


def pixels(n, channels=3, side=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side), dtype=np.uint8)


def archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(f"cifar-batches-bin/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def records(x, *labels):
    columns = [np.asarray(label, np.uint8)[:, None] for label in labels]
    return np.concatenate([*columns, x.reshape(len(x), -1)], 1).tobytes()


def cifar10(path, labels=range(10)):
    x, y = pixels(12), [*labels, 3, 4]
    parts = {f"data_batch_{k + 1}.bin": records(x[2 * k : 2 * k + 2], y[2 * k : 2 * k + 2]) for k in range(5)}
    return archive(path, {"readme.html": b"hello", **parts, "test_batch.bin": records(x[10:], y[10:])}), x, y


def idx(path, values):
    header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
    data = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def mnist(folder, suffix=".gz", labels=(3, 1, 4, 1)):
    x = pixels(6, 1, 5)[:, 0]
    return [
        idx(folder / f"train-images-idx3-ubyte{suffix}", x[:4]),
        idx(folder / f"train-labels-idx1-ubyte{suffix}", np.array(labels)),
        idx(folder / f"t10k-images-idx3-ubyte{suffix}", x[4:]),
        idx(folder / f"t10k-labels-idx1-ubyte{suffix}", np.array([9, 2])),
    ], x


def test_cifar_archives_read_back(tmp_path):
    path, x, y = cifar10(tmp_path / "c.tar.gz")
    found = read_cifar(path)
    assert torch.equal(torch.cat([found.train_x, found.test_x]), torch.from_numpy(x).float() / 255)
    assert [*found.train_y.tolist(), *found.test_y.tolist()] == y
    assert (found.n, found.classes, found.name) == (10, 10, "CIFAR-10")
    coarse, fine = [1, 19, 0], [7, 99, 0]
    path = archive(tmp_path / "f.tar.gz", {
        "train.bin": records(x[:3], coarse, fine), "test.bin": records(x[3:4], [5], [50]), "fine_label_names.txt": b"a"
    })  # fmt: skip
    hundred = read_cifar(path, "mine", torch.float64)
    assert torch.equal(hundred.train_x, torch.from_numpy(x[:3]).double() / 255)
    assert (hundred.train_y.tolist(), hundred.test_y.tolist()) == (fine, [50])
    assert (hundred.classes, hundred.name) == (100, "mine")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files_read_back(tmp_path, suffix):
    files, x = mnist(tmp_path, suffix)
    found = read_idx(*files)
    assert torch.equal(found.train_x, torch.from_numpy(x[:4, None]).float() / 255)
    assert torch.equal(found.test_x, torch.from_numpy(x[4:, None]).float() / 255)
    assert (found.train_y.tolist(), found.test_y.tolist()) == ([3, 1, 4, 1], [9, 2])
    assert (found.classes, found.name) == (10, tmp_path.name)


def parquet(path, x, labels, label="label"):
    stored = []
    for image in x:
        buffer = io.BytesIO()
        Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG")
        stored.append({"bytes": buffer.getvalue(), "path": None})
    pq.write_table(pa.table({"img": stored, label: labels}), path)
    return path


def test_parquet_in_several_parts(tmp_path):
    x = pixels(5, side=4)
    parts = [parquet(tmp_path / "0.parquet", x[:3], [0, 1, 2]), parquet(tmp_path / "1.parquet", x[3:], [3, 0])]
    found = read_parquet(parts, parts[1])
    assert torch.equal(found.train_x, torch.from_numpy(x).float() / 255)
    assert (found.train_y.tolist(), found.test_y.tolist(), found.classes) == ([0, 1, 2, 3, 0], [3, 0], 4)
    other = parquet(tmp_path / "2.parquet", pixels(1, side=6), [0])
    with pytest.raises(ValueError, match=r"0.parquet' are 4x4 .* '.*2.parquet' 6x6"):
        read_parquet([parts[0], other], parts[1])
    with pytest.raises(ValueError, match="no file was given"):
        read_parquet([], parts[1])


def served(monkeypatch, name, layout, paths, classes, known=True):
    """A source whose addresses are local files."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    files = tuple(File(p.as_uri(), d if known else "") for p, d in zip(paths, digests, strict=True))
    monkeypatch.setitem(SOURCES, name, Source(layout, files, classes))
    return dict(zip([path.name for path in paths], digests, strict=True))


def test_sets_by_name_are_fetched_once_and_checked(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    files, x = mnist(there)
    served(monkeypatch, "digits28", "idx", files, 10)
    found = known_images("digits28", tmp_path / "here")
    assert torch.equal(found.train_x, torch.from_numpy(x[:4, None]).float() / 255)
    assert found.name == "digits28"
    assert sorted(p.name for p in (tmp_path / "here" / "digits28").iterdir()) == sorted(p.name for p in files)
    for path in files:
        path.unlink()
    assert torch.equal(known_images("digits28", tmp_path / "here").train_x, found.train_x)  # from the folder
    with pytest.raises(ValueError, match="SHA-256 differs"):
        known_images("digits28", tmp_path / "here", {"t10k-labels-idx1-ubyte.gz": "0" * 64})
    path, *_ = cifar10(there / "cifar.tar.gz")
    served(monkeypatch, "small-cifar", "cifar", [path], 10)
    assert known_images("small-cifar", tmp_path / "here").n == 10


def test_unknown_checksums_are_the_users_to_give(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    train = parquet(there / "train-00000-of-00001.parquet", pixels(3, side=4), [0, 41, 99], "fine_label")
    test = parquet(there / "test-00000-of-00001.parquet", pixels(1, side=4), [7], "fine_label")
    digests = served(monkeypatch, "hundred", "parquet", [train, test], 100, known=False)
    found = known_images("hundred", tmp_path / "here", digests)
    assert (found.train_y.tolist(), found.classes) == ([0, 41, 99], 100)
    assert known_images("hundred", tmp_path / "here").n == 3
    with pytest.raises(ValueError, match="SHA-256 differs"):
        known_images("hundred", tmp_path / "elsewhere", digests | {test.name: "0" * 64})
    with pytest.raises(ValueError, match="has no file 'x': give checksums of train"):
        known_images("hundred", tmp_path / "here", {"x": ""})


def test_the_table_is_whole():
    counts = {"parquet": 2, "cifar": 1, "idx": 4}
    for name, source in SOURCES.items():
        assert len(source.files) == counts[source.layout], name
        assert all(file.address.startswith(("https://", "http://")) for file in source.files)
        assert all(re.fullmatch("[0-9a-f]{64}|", file.sha256) for file in source.files)
        assert all((file.sha256 == "") == (source.layout == "parquet") for file in source.files)
        assert len({file.name for file in source.files}) == len(source.files)
    known = [file.sha256 for source in SOURCES.values() for file in source.files if file.sha256]
    assert len(set(known)) == len(known) == 10


def cut(path, at=-20):
    path.write_bytes(path.read_bytes()[:at])
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def idx_with(folder, place, path):
    files, _ = mnist(folder)
    files[place] = path(files[place])
    return read_idx(*files)


BAD = {
    "no file": lambda p: read_cifar(p / "absent.tar.gz"),
    "no whole .tar.gz": lambda p: read_cifar(written(p / "x.tar.gz", b"hello")),
    "no whole .tar.gz archive .*ended": lambda p: read_cifar(cut(cifar10(p / "c.tar.gz")[0], -9000)),
    "has no 'data_batch_1.bin': give CIFAR's": lambda p: read_cifar(archive(p / "c.tar.gz", {"data_batch_1": b""})),
    "holds 100 bytes of images, not records of 3074": lambda p: read_cifar(
        archive(p / "c.tar.gz", {"train.bin": bytes(100), "test.bin": bytes(3074)})
    ),
    "row 4 .* has label 11 and there are 10": lambda p: read_cifar(cifar10(p / "c", [0, 1, 2, 3, 11, *range(5)])[0]),
    "there is no file '.*gone'": lambda p: idx_with(p, 0, lambda path: p / "gone"),
    "is no idx file of images": lambda p: idx_with(p, 0, lambda path: p / "train-labels-idx1-ubyte.gz"),
    "is no idx file of labels": lambda p: idx_with(p, 3, lambda path: written(p / "t", b"abc")),
    "no whole .gz file": lambda p: idx_with(p, 2, cut),
    "holds 95 entries and says 4 x 5 x 5": lambda p: idx_with(
        p, 0, lambda path: written(p / "t", gzip.decompress(path.read_bytes())[:-5])
    ),
    "4 images and .* 2 labels": lambda p: idx_with(p, 1, lambda path: p / "t10k-labels-idx1-ubyte.gz"),
    "row 1 .* has label 10": lambda p: read_idx(*mnist(p, labels=(0, 10, 1, 2))[0]),
    "did you mean 'cifar10'": lambda p: known_images("cifar-10", p),
    "no image set 'x': choose one of cifar10, ": lambda p: known_images("x", p),
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD)
def test_bad_files_are_one_sentence(sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence) as told:
        BAD[sentence](tmp_path)
    assert str(told.value).endswith(".")
    assert "\n" not in str(told.value)
