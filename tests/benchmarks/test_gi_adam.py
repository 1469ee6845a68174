"""The published direction of GI-Adam: it trains at rates at which Adam fails, as warmup does."""

import pytest

from benchmarks import gi_adam


@pytest.mark.slow
def test_gi_adam_trains_where_adam_fails_and_as_well_where_it_does_not():
    low, high = (
        {
            name: gi_adam.best_accuracy(make(), steps=200, seeds=1)
            for name, make in gi_adam.optimizers(rate, warmup=100).items()
        }
        for rate in (0.01, 0.1)
    )
    assert min(low.values()) > 0.97
    assert high["GI-Adam"] > 0.95 < high["Adam, warmup"]
    assert high["Adam"] < 0.75
