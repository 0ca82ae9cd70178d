"""Labels in the layout of SRe2L's relabel: read, and written."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prism_jax.core import augment
from prism_jax.data.sets import fkd, torch_file
from prism_jax.errors import UserError
from prism_jax.types import Normalisation

CLASSES, IPC, SIZE, BATCH, EPOCHS = 5, 4, 16, 6, 4
COUNT = CLASSES * IPC
LABELS = np.repeat(np.arange(CLASSES), IPC)
PLAIN = Normalisation((0.0,) * 3, (1.0,) * 3)


def test_the_order_is_pytorchs():
    """What torch.randperm(10) gives after torch.Generator().manual_seed(42), twice."""
    first, second = [2, 6, 1, 8, 4, 5, 0, 9, 3, 7], [3, 5, 8, 9, 4, 6, 1, 0, 7, 2]
    assert fkd.torch_orders(10, 2, draws=1).tolist() == [first, second]
    two = fkd.torch_orders(10, 2)
    assert two[0].tolist() == first and two[1].tolist() != second


def test_the_order_is_pytorchs_by_pytorch():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    generator = torch.Generator()
    generator.manual_seed(42)
    sampler = torch.utils.data.RandomSampler(range(1000), generator=generator)
    assert fkd.torch_orders(1000, 3).tolist() == [list(sampler) for _ in range(3)]


def a_batch(draw, index, *, mix="cutmix", half=True, side=SIZE):
    """One batch as the reference makes it, with labels that know the classes."""
    count = len(index)
    size = draw.integers(6, SIZE + 1, (count, 2))
    start = draw.integers(0, SIZE - size + 1)
    coords = (np.concatenate([start, size], 1) / SIZE).astype(np.float32)
    flips, partner = draw.random(count) < 0.5, draw.permutation(count)
    box = [3, 5, 9, side]  # rows 3 to 9, columns 5 to 16
    logits = draw.normal(size=(count, CLASSES)).astype(np.float16 if half else np.float32)
    logits[np.arange(count), LABELS[index]] += 5
    lam = 0.7
    if mix == "none":
        partner = lam = box = None
    elif mix == "mixup":
        box = None
    return [coords, flips, partner, lam, box, logits]


def write(root, orders, save=torch_file.save, **how):
    draw, batches = np.random.default_rng(0), {}
    for epoch, order in enumerate(orders):
        (root / f"epoch_{epoch}").mkdir(parents=True)
        for number, at in enumerate(range(0, COUNT, BATCH)):
            batch = a_batch(draw, order[at : at + BATCH], **how)
            save(root / f"epoch_{epoch}" / f"batch_{number}.tar", batch)
            batches[epoch, number] = batch
    return batches


def opened(root, **arguments):
    arguments = {"labels_N": LABELS, "num_classes": CLASSES, "image_size": SIZE, **arguments}
    return fkd.FkdLabels(str(root), **arguments)


def assert_read(reader, batches, orders):
    records = list(reader.read())
    assert len(records) == len(batches) and reader.plan.batch_size == BATCH
    for record in records:
        coords, flips, partner, lam, box, logits = batches[record.epoch, record.batch]
        at = record.batch * BATCH
        assert record.index_B.tolist() == orders[record.epoch][at : at + BATCH].tolist()
        np.testing.assert_array_equal(record.logits_BK, logits.astype(np.float32))
        view, mix = record.shown
        np.testing.assert_array_equal(view.crop, np.rint(coords * SIZE))
        np.testing.assert_array_equal(view.flip, flips)
        if partner is None:
            assert mix.partner_B.tolist() == list(range(len(logits))) and (mix.weight == 1).all()
            continue
        assert mix.partner_B.tolist() == list(partner)
        if box:
            assert (mix.box == box).all() and (mix.blend == 1).all()
            np.testing.assert_allclose(mix.weight, 1 - 6 * 11 / SIZE**2)
        else:
            np.testing.assert_allclose([mix.weight, mix.blend], lam)


@pytest.mark.parametrize("mix", ["cutmix", "mixup", "none"])
@pytest.mark.parametrize("draws", [1, 2])
def test_labels_of_either_sampler_are_told_by_looking(tmp_path, draws, mix):
    orders = fkd.torch_orders(COUNT, EPOCHS, draws=draws)
    batches = write(tmp_path, orders, mix=mix)
    reader = opened(tmp_path)
    assert_read(reader, batches, orders)
    assert any(("today" if draws == 2 else "an older") in note for note in reader.notes)


def test_boxes_of_smaller_images_are_refused(tmp_path):
    """Their pixels would be others, and so would the share of the image that is mixed in."""
    orders = fkd.torch_orders(COUNT, EPOCHS)
    write(tmp_path / "a", orders, side=14)
    with pytest.raises(UserError, match="beyond pixel 14, and dataset.image_size is 16"):
        opened(tmp_path / "a")
    write(tmp_path / "b", orders[:2], side=14)  # four boxes may all lie within by chance
    assert opened(tmp_path / "b").plan.epochs == 2


def test_labels_that_pytorch_wrote_in_the_order_of_its_loader(tmp_path):
    """As the reference's relabel: its sampler and loader, its file, NumPy's numbers in the box."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    generator = torch.Generator()
    generator.manual_seed(42)
    sampler = torch.utils.data.RandomSampler(range(COUNT), generator=generator)
    loader = torch.utils.data.DataLoader(torch.arange(COUNT), batch_size=BATCH, sampler=sampler)
    orders = [np.concatenate([b.numpy() for b in loader]) for _ in range(EPOCHS)]

    def save(path, batch):
        coords, flips, partner, lam, box, logits = batch
        tensors = [torch.from_numpy(x) for x in (coords, flips, partner)]
        box = [np.int64(n) for n in box]
        torch.save([*tensors, lam, box, torch.from_numpy(logits)], path)

    batches = write(tmp_path, orders, save=save)
    assert_read(opened(tmp_path), batches, orders)


def test_labels_that_say_their_images_are_read_in_any_order(tmp_path):
    """As G-VBSM's and EDC's relabel writes them."""
    orders = np.stack([np.random.default_rng(e).permutation(COUNT) for e in range(EPOCHS)])
    batches = write(tmp_path, orders)
    for (epoch, number), batch in batches.items():
        at = orders[epoch][number * BATCH : (number + 1) * BATCH]
        torch_file.save(tmp_path / f"epoch_{epoch}" / f"batch_{number}.tar", [*batch, at])
    places = np.random.default_rng(9).permutation(COUNT)  # of ours among the labelled files
    reader = opened(tmp_path, labels_N=LABELS[places], places_N=places)
    assert_read(reader, batches, [np.argsort(places)[order] for order in orders])
    assert "the positions stored with them" in reader.notes[0]
    at[0] = COUNT
    torch_file.save(tmp_path / f"epoch_{epoch}" / f"batch_{number}.tar", [*batch, at])
    with pytest.raises(UserError, match=f"other images than the {COUNT} of the set"):
        list(opened(tmp_path).read())


def test_another_order_is_refused_unless_it_is_stated(tmp_path):
    root = tmp_path / "labels"
    orders = np.stack([np.random.default_rng(e).permutation(COUNT) for e in range(EPOCHS)])
    batches = write(root, orders)
    with pytest.raises(UserError, match=r"labelled is not known: .* state it in .*order.pt"):
        opened(tmp_path)
    torch_file.save(tmp_path / "order.pt", orders)
    assert_read(opened(tmp_path), batches, orders)
    torch_file.save(tmp_path / "order.pt", orders[:, :-1])
    with pytest.raises(UserError, match=r"of integers of shape \(4, 20\)"):
        opened(tmp_path)


def test_a_stated_order_is_part_of_what_identifies_the_labels(tmp_path):
    orders = fkd.torch_orders(COUNT, EPOCHS)
    write(tmp_path / "labels", orders)
    found = {fkd.digest(str(tmp_path))}
    for order in (orders, orders[::-1]):
        torch_file.save(tmp_path / "order.pt", order)
        found.add(fkd.digest(str(tmp_path)))
    assert len(found) == 3 and fkd.digest(str(tmp_path / "labels")) in found


@pytest.mark.parametrize("wrong, said", [
    (lambda orders: orders.astype(np.float32), "it holds a tensor of type float32"),
    (lambda orders: orders + 1, "epoch 0 repeats or lacks"),
    (lambda orders: orders - 1, "epoch 0 repeats or lacks"),
    (lambda orders: np.concatenate([orders[:1], 0 * orders[1:]]), "epoch 1 repeats or lacks"),
    (lambda orders: orders.tolist(), "it holds list"),
])  # fmt: skip
def test_a_stated_order_gives_every_image_one_place(tmp_path, wrong, said):
    orders = fkd.torch_orders(COUNT, EPOCHS)
    write(tmp_path / "labels", orders)
    torch_file.save(tmp_path / "order.pt", wrong(orders))
    with pytest.raises(UserError, match=f"position from 0 to 19 once; .*{said}"):
        opened(tmp_path)


def test_images_may_stand_in_another_order_than_in_their_folder(tmp_path):
    """Our class 0 is the last folder: its images are the last ones of the ImageFolder."""
    orders = fkd.torch_orders(COUNT, EPOCHS)
    write(tmp_path, orders)
    places = np.concatenate([np.arange(COUNT - IPC, COUNT), np.arange(COUNT - IPC)])
    reader = opened(tmp_path, labels_N=LABELS[places], places_N=places)
    np.testing.assert_array_equal(places[reader[0].index_B], orders[0][:BATCH])
    with pytest.raises(UserError, match="not known"):  # the twin: it is left out
        opened(tmp_path, labels_N=LABELS[places])


def test_what_is_not_whole_is_named(tmp_path):
    orders = fkd.torch_orders(COUNT, EPOCHS)
    write(tmp_path, orders)
    with pytest.raises(UserError, match="another recover.ipc"):
        opened(tmp_path, labels_N=LABELS[:10])
    with pytest.raises(UserError, match=r"shape \(6, 5\); the data has 7 classes"):
        opened(tmp_path, num_classes=7)
    with pytest.raises(UserError, match="larger than dataset.image_size=8"):
        opened(tmp_path, image_size=8)
    (tmp_path / "epoch_2" / "batch_1.tar").unlink()
    with pytest.raises(UserError, match="epoch_2/batch_1.tar is missing"):
        opened(tmp_path)
    (tmp_path / "epoch_1").rename(tmp_path / "gone")
    with pytest.raises(UserError, match="without a gap"):
        opened(tmp_path)
    with pytest.raises(UserError, match="has no folder epoch_0; relabel.labels_from takes"):
        opened(tmp_path / "gone")


def test_images_are_shown_as_the_reference_shows_them(tmp_path):
    """Pillow's crop and bilinear resize, its flip, and the box pasted as the reference does."""
    orders = fkd.torch_orders(COUNT, EPOCHS)
    batches = write(tmp_path, orders)
    record = opened(tmp_path)[0]
    pixels = np.random.default_rng(2).integers(0, 256, (COUNT, SIZE, SIZE, 3), np.uint8)
    found = np.asarray(augment.show(pixels[record.index_B], *record.shown, PLAIN))

    coords, flips, partner, _, (top, left, bottom, right), _ = batches[0, 0]
    wanted = []
    for image, (i, j, h, w), flip in zip(pixels[orders[0][:BATCH]], coords, flips, strict=True):
        i, j, h, w = (float(x) * SIZE for x in (i, j, h, w))
        crop = Image.fromarray(image).crop((j, i, j + w, i + h))
        crop = crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        wanted.append(np.array(crop)[:, ::-1] if flip else np.array(crop))
    wanted = np.stack(wanted) / 255
    mixed = wanted.copy()
    mixed[:, top:bottom, left:right] = wanted[partner][:, top:bottom, left:right]
    np.testing.assert_allclose(found, mixed, atol=1.01 / 255)  # Pillow rounds to bytes
    assert np.abs(found - wanted).max() > 0.1  # the twin: without the mix
