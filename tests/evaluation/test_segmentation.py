import numpy as np
import pytest

from diffusers_ext.evaluation.segmentation import mean_iou


def test_classes_count_alike_and_unknown_labels_are_wrong():
    wanted = np.array([[0, 0, 0, 1]])
    assert mean_iou([wanted], [wanted], 3) == 1  # the third class is nowhere
    assert mean_iou([np.array([[0, 0, 1, 1]])], [wanted], 3) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert mean_iou([np.array([[0, 0, 0, 255]], dtype=np.uint8)], [wanted], 3) == pytest.approx(1 / 2)
    assert mean_iou([np.array([[0, 0, 2, 1]])], [wanted], 3) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_the_ground_may_be_left_out():
    wanted = np.array([[0, 0, 0, 1]])
    assert mean_iou([np.array([[0, 0, 1, 1]])], [wanted], 3, left_out=(0,)) == pytest.approx(1 / 2)
    assert np.isnan(mean_iou([wanted], [wanted], 3, left_out=(0, 1)))


def test_counts_run_over_all_maps():
    wanted = [np.array([[0, 1]]), np.array([[0, 0]])]
    found = [np.array([[0, 1]]), np.array([[1, 0]])]
    assert mean_iou(found, wanted, 2) == pytest.approx((2 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        ([], [], "`found` holds 0 maps, `wanted` 0: they must pair up, at least one"),
        ([np.zeros((1, 2))], [np.zeros((2, 1))], r"Map 0 of `found` is \(1, 2\), that of `wanted` \(2, 1\)"),
        ([np.zeros((1, 1))], [np.full((1, 1), 2)], "labels from 2 to 2; they must lie between 0 and"),
    ],
)
def test_maps_that_do_not_fit_are_refused(found, wanted, message):
    with pytest.raises(ValueError, match=message):
        mean_iou(found, wanted, 2)
