"""The drawn data set: real glyphs only, none twice, whole scripts held out."""

import unicodedata

import numpy as np
import pytest
import torch

from fastmaml.vision import glyphs


@pytest.fixture(scope="module")
def data():
    return glyphs.draw_glyphs()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAML_CACHE", str(tmp_path))
    return tmp_path / "glyphs.npz"


def test_several_hundred_classes_of_twenty_images(data):
    assert data.images.dtype == torch.uint8
    assert data.images.shape == (len(data.names) * 20, 28, 28)
    assert torch.equal(data.labels.bincount(), torch.full((len(data.names),), 20))
    split = glyphs.split_glyphs(data)
    assert len(split.train) > 500
    assert len(split.validation) > 40
    assert len(split.test) > 100


def test_every_image_has_ink_on_paper(data):
    ink = data.images.float().mean(dim=(1, 2))
    assert ink.min() > 255 * 0.02
    assert ink.max() < 255 * 0.7
    border = torch.cat([data.images[:, 0], data.images[:, -1]], dim=1)
    assert (border == 0).float().mean() > 0.98


def test_whole_scripts_are_held_out(data):
    def scripts(classes):
        return {unicodedata.name(data.names[i].split("/")[1]).split()[0] for i in classes}

    split = glyphs.split_glyphs(data)
    assert sorted(split.train + split.validation + split.test) == list(range(len(data.names)))
    assert scripts(split.test) == {"ARMENIAN", "GEORGIAN", "HEBREW", "TIFINAGH"}
    assert scripts(split.validation) == {"LAO", "NKO"}
    assert not scripts(split.train) & (scripts(split.test) | scripts(split.validation))


def test_look_alikes_are_one_class(data):
    characters = [name.split("/")[1] for name in data.names]
    assert len(characters) == len(set(characters))
    assert "A" in characters
    for alike in ("\N{GREEK CAPITAL LETTER ALPHA}", "\N{CYRILLIC CAPITAL LETTER A}"):
        assert alike not in characters
    assert "\N{ARMENIAN SMALL LETTER OH}" not in characters  # looks like a Latin o
    assert "\N{GEORGIAN LETTER AN}" in characters


def test_no_class_is_nearly_a_class_of_another_split(data):
    split = glyphs.split_glyphs(data)
    plain = torch.stack([data.images[data.labels == i][0] for i in range(len(data.names))])
    shapes = plain.double().flatten(1)
    shapes -= shapes.mean(dim=1, keepdim=True)
    shapes /= shapes.norm(dim=1, keepdim=True)
    likeness = shapes[split.train] @ shapes[split.test].T
    assert likeness.max() < 0.95


def test_a_face_without_the_character_is_not_used(data, monkeypatch):
    used = []
    outline = glyphs._outline

    def spy(face, character):
        used.append((face, character))
        return outline(face, character)

    monkeypatch.setattr(glyphs, "_outline", spy)
    glyphs._draw_class("\N{HEBREW LETTER ALEF}")
    assert {face for face, _ in used} == {
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSans-BoldOblique",
    }


def test_images_of_a_class_differ_and_repeat(data):
    first = data.images[data.labels == 0]
    assert len(np.unique(first.flatten(1).numpy(), axis=0)) == 20
    character = data.names[0].split("/")[1]
    assert np.array_equal(glyphs._draw_class(character), first.numpy())


def test_the_cache_is_read_back_and_replaced_when_stale(data, cache, monkeypatch):
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: data)
    glyphs.load_glyphs()
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: pytest.fail("should have been cached"))
    stored = glyphs.load_glyphs()
    assert torch.equal(stored.images, data.images)
    assert torch.equal(stored.labels, data.labels)
    assert stored.names == data.names

    fewer = data._replace(images=data.images[:20], labels=data.labels[:20], names=data.names[:1])
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: fewer)
    monkeypatch.setattr(glyphs, "_fingerprint", lambda: "another version")
    assert len(glyphs.load_glyphs().names) == 1
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: data)
    assert len(glyphs.load_glyphs().names) == 1


def test_a_damaged_cache_is_drawn_again(data, cache, monkeypatch):
    cache.write_bytes(b"PK\x03\x04 and then the disk was full")
    monkeypatch.setattr(glyphs, "draw_glyphs", lambda: data)
    assert glyphs.load_glyphs().names == data.names
