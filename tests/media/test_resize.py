"""Frames come out pixel for pixel as transformers' own image processor would make them."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import CLIPImageProcessorPil

from model.request import Geometry
from service.media.image import decode_image
from service.media.limits import MediaLimits
from service.media.refusal import Refusal
from service.media.resize import check_size, resize_to_geometry, resized
from tests.media.samples import encoded, picture

SIZES = [
    (1, 1),
    (7, 1),
    (2, 300),
    (8, 8),
    (31, 57),
    (57, 31),
    (224, 224),
    (225, 223),
    (333, 500),
    (641, 97),
    (97, 641),
    (48, 48),
    (47, 49),
]


def by_transformers(image, geometry: Geometry) -> np.ndarray:
    size = {"shortest_edge": geometry.shortest_edge}
    if geometry.exact is not None:
        size = {"height": geometry.exact[0], "width": geometry.exact[1]}
    crop = geometry.crop or (1, 1)
    processor = CLIPImageProcessorPil(
        size=size,
        do_resize=geometry.exact is not None or geometry.shortest_edge is not None,
        do_center_crop=geometry.crop is not None,
        crop_size={"height": crop[0], "width": crop[1]},
        resample=geometry.resample,
        do_rescale=False,
        do_normalize=False,
    )
    return np.moveaxis(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]), 0, -1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(exact=None, shortest_edge=48, crop=(48, 48), resample=3, default_num_frames=4),
        Geometry(exact=None, shortest_edge=51, crop=(48, 33), resample=3, default_num_frames=4),
        Geometry(exact=None, shortest_edge=33, crop=(48, 47), resample=2, default_num_frames=4),  # crop pads
        Geometry(exact=(48, 33), shortest_edge=None, crop=None, resample=3, default_num_frames=4),
        Geometry(exact=(33, 48), shortest_edge=None, crop=(33, 33), resample=1, default_num_frames=4),
        Geometry(exact=(40, 40), shortest_edge=None, crop=(50, 21), resample=2, default_num_frames=4),
        Geometry(exact=None, shortest_edge=40, crop=None, resample=0, default_num_frames=4),
        Geometry(exact=None, shortest_edge=None, crop=(24, 25), resample=3, default_num_frames=4),
    ],
    ids=str,
)
def test_pixels_equal_those_of_transformers(size, geometry):
    image = picture(*size)
    expected = by_transformers(image, geometry)
    np.testing.assert_array_equal(resize_to_geometry(image, geometry), expected)


def test_a_decoded_file_equals_what_transformers_makes_of_it():
    geometry = Geometry(exact=None, shortest_edge=48, crop=(48, 48), resample=3, default_num_frames=4)
    image = picture(123, 77)
    frames = decode_image(encoded(image, "PNG"), "PNG", limits=MediaLimits(), geometry=geometry)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, by_transformers(image, geometry)[None])


def test_long_sides_are_truncated_not_rounded():
    geometry = Geometry(exact=None, shortest_edge=10, crop=None, resample=3, default_num_frames=4)
    assert resized(3, 5, geometry) == (10, 16)
    assert resized(5, 3, geometry) == (16, 10)


def test_a_strip_that_would_grow_beyond_all_limits_is_refused():
    """8 x 16,384 pixels are few; with the short side at 896 they would be 1.6 thousand million."""
    geometry = Geometry(exact=None, shortest_edge=896, crop=(896, 896), resample=3, default_num_frames=4)
    limits = MediaLimits()
    check_size(1600, 900, max_pixels=limits.max_pixels, limits=limits, geometry=geometry)
    for narrow in ((8, 16_384), (16_384, 8), (1, 63)):
        with pytest.raises(Refusal, match="too_narrow") as refusal:
            check_size(*narrow, max_pixels=limits.max_pixels, limits=limits, geometry=geometry)
        assert refusal.value.numbers["max_ratio"] == 62
    for ordinary in ((1, 62), (1, 1), (16_384, 265), (7000, 7000)):
        check_size(*ordinary, max_pixels=limits.max_pixels, limits=limits, geometry=geometry)
        width, height = resized(*ordinary, geometry)
        assert width * height <= limits.max_pixels
