"""Sheets of pictures: valid, changed by what they show, and the right ones chosen."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from training import sheets
from training.sheets import Neighbours, Strip

RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(0, 256, (9, 32, 32), dtype=np.uint8)


def opened(png: bytes) -> Image.Image:
    found = Image.open(BytesIO(png))
    found.load()
    assert found.format == "PNG"
    return found


def test_a_contact_sheet_shows_up_to_eight_pictures_of_each_cluster() -> None:
    sheet = sheets.contact_sheet([Strip("cluster 3, 9 images", PICTURES), Strip("cluster 7, 2 images", PICTURES[:2])])
    found = opened(sheet)
    assert found.width < 1000
    assert found.height > 2 * sheets.TILE_PX
    assert sheet == sheets.contact_sheet([Strip("cluster 3, 9 images", PICTURES[:8]), Strip("cluster 7, 2 images", PICTURES[:2])])
    assert sheet != sheets.contact_sheet(
        [Strip("cluster 3, 9 images", PICTURES[::-1]), Strip("cluster 7, 2 images", PICTURES[:2])]
    )
    white = sheets.contact_sheet([Strip("", np.full((1, 8, 8), 255, np.uint8))])
    assert (np.asarray(opened(white)) == 255).sum() == sheets.TILE_PX**2


def test_a_caption_that_is_too_long_is_cut_and_an_empty_sheet_is_one() -> None:
    opened(sheets.contact_sheet([Strip("cluster " * 100, PICTURES[:1])]))
    opened(sheets.contact_sheet([]))


def test_the_neighbours_of_a_picture_come_by_cosine_with_their_similarity_below() -> None:
    features = np.array([[1.0, 0], [10, 1], [0, 1], [-1, 0], [3, 3]])
    rows, cosine = sheets.nearest(features, [0, 2], "abcde", count=3)
    assert rows.tolist() == [[1, 4, 2], [4, 1, 0]]
    assert cosine[0] == pytest.approx([10 / 101**0.5, 0.5**0.5, 0], abs=1e-12)
    sheet = sheets.neighbours_sheet([Neighbours("query 1", PICTURES[[0, *rows[0]]], cosine[0])])
    opened(sheet)
    assert sheet != sheets.neighbours_sheet([Neighbours("query 1", PICTURES[[0, *rows[0]]], cosine[0] / 2)])
    with pytest.raises(ValueError, match="as many neighbours"):
        Neighbours("query 1", PICTURES[:3], cosine[0])


def test_other_pictures_of_the_same_patient_are_no_neighbours() -> None:
    features = np.array([[1.0, 0], [10, 1], [0, 1], [-1, 0], [3, 3]])
    rows, cosine = sheets.nearest(features, [0, 2], "aabac", count=3)
    assert rows.tolist() == [[4, 2], [4, 1]], "as many as the query with the fewest has"
    assert np.isfinite(cosine).all()
    assert sheets.nearest(features, [0], "aaaaa")[0].shape == (1, 0)


def test_the_largest_smallest_and_oddest_clusters_are_chosen_each_once() -> None:
    sizes = {4: 9, 7: 2, 9: 5, 12: 6}
    assignment = np.concatenate([np.full(size, cluster) for cluster, size in sizes.items()])
    spread = np.where(assignment == 9, 5.0, 0.1)
    features = RANDOM.normal(size=(len(assignment), 4)) * spread[:, None]
    assert sheets.chosen_clusters(features, assignment, each=1) == {"largest": (4,), "smallest": (7,), "oddest": (9,)}
    chosen = sheets.chosen_clusters(features, assignment, each=3)
    assert chosen == {"largest": (4, 12, 9), "smallest": (7,), "oddest": ()}


def test_a_map_is_the_same_for_the_same_seed_and_always_shows_what_it_is_told_to_keep() -> None:
    features = RANDOM.normal(size=(60, 8)) + np.repeat([[0], [9]], 30, axis=0)
    rows, places = sheets.embedding(features, seed=3, keep=(58, 1), limit=20)
    again, same = sheets.embedding(features, seed=3, keep=(58, 1), limit=20)
    assert len(rows) == len(set(rows.tolist())) == 20
    assert {1, 58} <= set(rows.tolist())
    assert np.array_equal(rows, again)
    assert np.array_equal(places, same)
    assert not np.array_equal(rows, sheets.embedding(features, seed=4, limit=20)[0])
    side = rows >= 30
    between = np.linalg.norm(places[side].mean(axis=0) - places[~side].mean(axis=0))
    assert between > max(np.linalg.norm(places[one] - places[one].mean(axis=0), axis=1).mean() for one in (side, ~side))


def test_a_map_shows_clusters_labels_and_pictures() -> None:
    places, clusters = RANDOM.normal(size=(9, 2)), np.arange(9) % 3
    plain = sheets.embedding_map(places, clusters)
    labelled = sheets.embedding_map(places, clusters, labels=np.array([0, 1] + [-1] * 7), names=("a", "b"))
    pinned = sheets.embedding_map(places, clusters, thumbnails=PICTURES)
    others = sheets.embedding_map(places, clusters, thumbnails=PICTURES[::-1])
    assert len({plain, labelled, pinned, others, sheets.embedding_map(places, clusters + 1)}) == 5
    assert {opened(one).size for one in (plain, labelled, pinned, others)} == {(960, 720)}
    assert plain == sheets.embedding_map(places, clusters)
