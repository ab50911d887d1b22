from dataclasses import FrozenInstanceError, fields, replace
from inspect import cleandoc

import pytest

from ff_utils.config import FFConfig, LayerConfig, LocalConfig, RecurrentConfig, TrainConfig

CONFIGS = (LayerConfig, FFConfig, LocalConfig, RecurrentConfig, TrainConfig)


@pytest.mark.parametrize("config", CONFIGS)
def test_config_describes_every_field_and_never_changes(config):
    documented = "\n".join(cleandoc(c.__doc__) for c in config.__mro__ if c in CONFIGS)
    for field in fields(config):
        assert f"\n{field.name}:" in documented, field.name
    with pytest.raises(FrozenInstanceError):
        config().seed = 1


@pytest.mark.parametrize(
    ("config", "name", "value", "wanted"),
    [
        (LayerConfig, "normalisation", "batch", "choose one of: length, mean_square"),
        (LayerConfig, "loss", "huber", "choose one of: softplus, probabilistic, linear, pairwise"),
        (LayerConfig, "threshold", 0, "above 0"),
        (LayerConfig, "sharpness", -1.0, "above 0"),
        (LayerConfig, "optimizer", "lion", "choose one of: adam, adam_8bit, sgd"),
        (LayerConfig, "weight_decay", 1.5, "at most 1"),
        (FFConfig, "threshold", float("nan"), "above 0"),
        (FFConfig, "label", "top", "choose one of: joined, pixels, none"),
        (FFConfig, "label_scale", 0, "above 0"),
        (FFConfig, "first_read", 0, "whole number of at least 1"),
        (LocalConfig, "label_scale", "1e-3", "a number above 0"),
        (RecurrentConfig, "damping", 1.0, "at most 0.99"),
        (RecurrentConfig, "steps", 0, "whole number of at least 1"),
        (RecurrentConfig, "label_scale", 0, "above 0"),
        (RecurrentConfig, "last", 9, "at most 8"),
        (RecurrentConfig, "first", 6, "at most 5"),
        (RecurrentConfig, "sharpness", True, "above 0"),
        (TrainConfig, "epochs", 0, "whole number of at least 1"),
        (TrainConfig, "batch_size", 1.5, "whole number of at least 1"),
        (TrainConfig, "learning_rate", 0, "above 0 and at most 1"),
        (TrainConfig, "decay", "cosine", "choose one of: none, linear"),
        (TrainConfig, "random_shift", -1, "of at least 0"),
        (TrainConfig, "dropout", 0.95, "at most 0.9"),
        (TrainConfig, "schedule", "greedy", "choose one of: joint, layerwise"),
        (TrainConfig, "negatives", "soft", "choose one of: random, hard, rollout"),
        (TrainConfig, "classifier_update_prob", 0, "above 0 and at most 1"),
        (TrainConfig, "classifier_rate", 2, "at most 1"),
        (TrainConfig, "rollout_length", 0, "of at least 1"),
        (TrainConfig, "mask_blurs", 0, "of at least 1"),
    ],
)
def test_config_refuses_a_wrong_value_by_name(config, name, value, wanted):
    with pytest.raises(ValueError, match=rf"^{name} is .*{wanted}"):
        config(**{name: value})
    with pytest.raises(ValueError, match=rf"^{name} is "):  # a changed copy is checked as well
        replace(config(), **{name: value})


def test_config_of_a_network_that_could_not_predict_is_refused():
    with pytest.raises(ValueError, match=r"label is 'none'.*give classifier=True"):
        FFConfig(label="none", classifier=False)
