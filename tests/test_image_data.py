"""Image sets from parquet and download, augmentation and label noise: what is drawn, and one sentence for bad files."""

import hashlib
import http.server
import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nets.augment import Augmentation
from nets.image_files import download, read_parquet
from nets.images import ImageSet, channel_statistics, digits
from nets.label_noise import (
    flip_asymmetric,
    flip_symmetric,
    fresh_batch_flips,
    fresh_different_class,
    noisy_targets,
)


def encoded(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write(path, images, labels, image="img", label="label"):
    stored = [{"bytes": encoded(pixels), "path": None} for pixels in images]
    pq.write_table(pa.table({image: stored, label: labels}), path)
    return path


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize(("image", "label"), [("img", "label"), ("image", "fine_label")])
def test_parquet_reads_back_the_pixels(tmp_path, pixels, image, label):
    train = write(tmp_path / "train.parquet", pixels[:4], [0, 2, 1, 0], image, label)
    test = write(tmp_path / "test.parquet", pixels[4:], [1, 2], image, label)
    found = read_parquet(train, test, name="mine")
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    assert torch.equal(found.train_x, expected[:4])
    assert torch.equal(found.test_x, expected[4:])
    assert found.train_y.tolist() == [0, 2, 1, 0]
    assert (found.classes, found.name) == (3, "mine")
    mean, deviation = channel_statistics(found.train_x)
    assert torch.allclose(mean, expected[:4].transpose(0, 1).flatten(1).mean(1))
    assert torch.allclose(deviation, expected[:4].transpose(0, 1).flatten(1).std(1, correction=0))


def test_grey_images_have_one_channel(tmp_path, pixels):
    train = write(tmp_path / "a.parquet", pixels[..., 0], range(6))
    assert read_parquet(train, train).train_x.shape == (6, 1, 4, 5)


NOTHING = pa.array([], pa.binary())
BAD = {
    "absent": (lambda good, p: p / "nowhere.parquet", "no file"),
    "truncated": (lambda good, p: _cut(good, p), "no whole parquet file"),
    "not parquet": (lambda good, p: _text(p), "no whole parquet file"),
    "no image column": (lambda good, p: _table(p, {"x": [1], "label": [0]}), "has columns x, label"),
    "no label column": (lambda good, p: _table(p, {"img": [b"1"], "y": [0]}), "has columns img, y"),
    "label out of range": (lambda good, p: write(p / "l.parquet", _images(2), [0, 7]), "row 1 .* label 7"),
    "negative label": (lambda good, p: write(p / "l.parquet", _images(2), [-1, 0]), "row 0 .* label -1"),
    "labels as text": (lambda good, p: write(p / "l.parquet", _images(2), ["a", "b"]), "not whole numbers"),
    "mixed sizes": (lambda good, p: write(p / "m.parquet", [*_images(1), *_images(1, 6)], [0, 1]), "row 1 .* is 6x5"),
    "other size than training": (lambda good, p: write(p / "m.parquet", _images(2, 6), [0, 1]), "one image size"),
    "no image bytes": (lambda good, p: _table(p, {"img": ["a.png"], "label": [0]}), "holds no image bytes"),
    "broken image": (lambda good, p: _table(p, {"img": [b"12345"], "label": [0]}), "no image that can be read"),
    "empty": (lambda good, p: _table(p, {"img": NOTHING, "label": pa.array([], pa.int64())}), "no rows"),
}  # fmt: skip


def _images(count, height=4):
    return list(np.zeros((count, height, 5, 3), np.uint8))


def _cut(good, folder):
    path = folder / "cut.parquet"
    path.write_bytes(good.read_bytes()[:-20])
    return path


def _text(folder):
    (folder / "t.parquet").write_text("hello")
    return folder / "t.parquet"


def _table(folder, columns):
    pq.write_table(pa.table(columns), folder / "t.parquet")
    return folder / "t.parquet"


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence(case, tmp_path, pixels):
    good = write(tmp_path / "good.parquet", pixels, [0, 1, 2, 0, 1, 2])
    make, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence) as fault:
        read_parquet(good, make(good, tmp_path))
    assert "\n" not in str(fault.value)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Serves ``data``, but drops the connection after ``drop`` bytes of an answer."""

    data, drop, ranges = b"", 0, True

    def do_GET(self):
        start = 0
        if self.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.requests.append(start)
        if self.path == "/absent":
            self.send_error(404)
            return
        rest = self.data[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.drop] if self.drop else rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Flaky.data, Flaky.drop, Flaky.ranges, Flaky.requests = np.random.default_rng(1).bytes(300_000), 0, True, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_download_resumes_and_checks(tmp_path, server):
    digest = hashlib.sha256(Flaky.data).hexdigest()
    Flaky.drop = 100_000
    path = download(f"{server}/x", tmp_path / "deep" / "x.bin", digest, wait=0.0)
    assert path.read_bytes() == Flaky.data
    assert Flaky.requests == [0, 100_000, 200_000]
    assert download(f"{server}/x", path, digest) == path
    assert len(Flaky.requests) == 3  # not fetched again
    with pytest.raises(ValueError, match="SHA-256 differs"):
        download(f"{server}/x", path, "0" * 64)
    assert path.read_bytes() == Flaky.data


def test_download_gives_up_in_one_sentence(tmp_path, server):
    with pytest.raises(ValueError, match="could not be fetched"):
        download(f"{server}/absent", tmp_path / "a", wait=0.0)
    assert len(Flaky.requests) == 1
    with pytest.raises(ValueError, match="SHA-256 differs"):
        download(f"{server}/x", tmp_path / "b", "0" * 64, wait=0.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="could not be fetched"):
        download("http://127.0.0.1:9/x", tmp_path / "c", tries=2, wait=0.0)


def test_a_server_that_cannot_resume_sends_it_again(tmp_path, server):
    Flaky.ranges = False
    (tmp_path / "x.part").write_bytes(b"half")
    Flaky.data = Flaky.data[:1000]
    assert download(f"{server}/x", tmp_path / "x", hashlib.sha256(Flaky.data).hexdigest()).read_bytes() == Flaky.data


def test_augmentation_is_crops_flips_and_cutout_of_the_image():
    x = torch.arange(1.0, 3 * 2 * 5 * 5 + 1).view(3, 2, 5, 5).repeat(40, 1, 1, 1)
    padded = torch.nn.functional.pad(x, [2] * 4)
    shown = Augmentation(crop=2, flip=True)(x, step=7)
    seen = set()
    for image, source in zip(shown, padded, strict=True):
        matches = [
            (top, left, flipped)
            for top in range(5) for left in range(5) for flipped in (False, True)
            if torch.equal(image.flip(-1) if flipped else image, source[:, top : top + 5, left : left + 5])
        ]  # fmt: skip
        assert matches
        seen.add(matches[0])
    assert len(seen) > 25  # of 50
    cut = Augmentation(cutout=3)(x, step=7)
    zeros = (cut == 0).sum((1, 2, 3)) / 2
    assert zeros.max() == 9
    assert zeros.min() >= 4  # a square at a corner
    assert torch.equal(cut[cut != 0], x[cut != 0])
    again = Augmentation(crop=2, flip=True)(x, step=7)
    assert torch.equal(again, shown)
    assert not torch.equal(Augmentation(crop=2, flip=True)(x, step=8), shown)
    assert torch.equal(Augmentation()(x, step=1), x)
    with pytest.raises(ValueError, match="0 or more"):
        Augmentation(crop=-1)


def test_static_flips():
    images = digits(1500)
    changed = flip_symmetric(images, 0.4)
    assert torch.equal(changed.train_x, images.train_x)
    share = (changed.train_y != images.train_y).double().mean().item()
    assert abs(share - 0.4 * 0.9) < 4 * (0.09 * 0.4 / 1500) ** 0.5
    assert torch.equal(flip_symmetric(images, 0.4).train_y, changed.train_y)
    cyclic = flip_asymmetric(images, 0.2)
    moved = cyclic.train_y != images.train_y
    assert moved.sum() == 300
    assert torch.equal(cyclic.train_y[moved], (images.train_y[moved] + 1) % 10)
    pairs = flip_asymmetric(images, 1.0, {3: 5, 5: 3})
    assert set(images.train_y[pairs.train_y != images.train_y].tolist()) == {3, 5}
    for wrong in (lambda: flip_symmetric(images, 1.5), lambda: flip_asymmetric(images, 0.5, {3: 12})):
        with pytest.raises(ValueError, match=r"choose|give class"):
            wrong()


def test_fresh_noise():
    y = torch.arange(10).repeat(2000)
    uniform = fresh_batch_flips(y, 0.3, 10, step=1)
    assert abs((uniform != y).double().mean().item() - 0.27) < 4 * (0.27 * 0.73 / len(y)) ** 0.5
    different = fresh_different_class(y, 0.3, 10, step=1)
    moved = different != y
    assert abs(moved.double().mean().item() - 0.3) < 4 * (0.21 / len(y)) ** 0.5
    shift = ((different - y) % 10)[moved]
    counts = torch.bincount(shift, minlength=10)[1:].double()
    expected = counts.sum() / 9
    assert ((counts - expected) ** 2 / expected).sum() < 30  # χ² with 8 degrees of freedom, beyond 4 sigma
    assert not torch.equal(fresh_different_class(y, 0.3, 10, step=2), different)
    targets = noisy_targets(y, 0.5, 10, step=1, dtype=torch.float64)
    noise = (targets - torch.nn.functional.one_hot(y, 10)) / 0.5
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.var().item() - 1) < 4 * (2 / noise.numel()) ** 0.5
    assert torch.equal(noisy_targets(y, 0.0, 10, 1), torch.nn.functional.one_hot(y, 10).float())


def test_a_set_refuses_what_does_not_fit():
    x, y = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="from 0 to 2"):
        ImageSet(x, y, x, y, 3)
