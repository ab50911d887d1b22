import pytest

from ff_utils.report import accuracy


def test_every_reading_is_listed_in_order_and_what_took_a_place_is_not_the_latest():
    found, latest = accuracy.readings(), accuracy.latest()
    assert found.finished.is_monotonic_increasing and len(found) >= 19
    recurrent = found[found.form.str.startswith("recurrent")]
    errors = [0.0140, 0.0154, 0.0140, 0.0182, 0.0137, 0.0150, 0.0131]
    assert list(recurrent.error)[:7] == errors
    assert (found.low < found.error).all() and (found.error < found.high).all()
    assert not latest.duplicated(["form", "seed"]).any() and not latest.earlier.any()
    assert list(latest[latest.form == "recurrent_all"].epochs) == [90]


def test_images_that_a_record_lists_as_wrong_are_as_many_as_its_error():
    rows = accuracy.readings().dropna(subset="wrong")
    assert len(rows) >= 3
    for row in rows.itertuples():
        assert len(set(row.wrong)) == len(row.wrong)
        assert abs(len(row.wrong) - row.error * row.images) < 1.5  # a network kept in 16 bits


def test_interval_over_seeds_is_students():
    # Three values 1 apart have a standard error of 1 / sqrt(3); t at 97.5 % and 2 degrees: 4.303.
    summary = accuracy.over_seeds()["supervised"]
    errors = accuracy.latest().query("form == 'supervised'").error
    reach = summary["high"] - summary["mean"]
    assert summary["mean"] == pytest.approx(errors.mean())
    assert summary["mean"] - summary["low"] == pytest.approx(reach)
    factors = {3: 4.30265, 4: 3.18245, 5: 2.77645}
    assert reach == pytest.approx(factors[len(errors)] * errors.sem(), rel=1e-4)
    alone = accuracy.over_seeds()["recurrent_all"]
    assert alone["seeds"] == 1 and alone["low"] is None


def test_wilson_interval_is_the_published_formula():
    for wrong, images in ((131, 10_000), (0, 100), (7, 8)):
        z, p = 1.959964, wrong / images
        middle = (p + z * z / 2 / images) / (1 + z * z / images)
        half = z / (1 + z * z / images) * (p * (1 - p) / images + (z / 2 / images) ** 2) ** 0.5
        found = accuracy.wilson(p, images)
        assert found == pytest.approx((middle - half, middle + half), abs=1e-6)


def test_mcnemar_counts_what_only_one_gets_wrong():
    # 1 against 5: twice the chance of at most one head in six throws, 2 * (1 + 6) / 64.
    found = accuracy.mcnemar([1, 2, 3], [2, 3, 4, 5, 6, 7, 8])
    assert found == {"only_first": 1, "only_second": 5, "p": pytest.approx(14 / 64)}
    assert accuracy.mcnemar([1, 2], [1, 2])["p"] == 1
