"""Which references of a preference objective a method of training can have."""

import pytest

from fitune.config import read_config
from fitune.errors import ConfigError

PAIRS = {"model": {"source": "m"}, "data": {"train": "d"}, "objective": "dpo"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("adapter_off", "model.method=full"), "model.method full has none"),
        (("adapter_off", "model.method=freeze"), "model.method freeze has none"),
        (("adapter_off", "model.method=lora", "model.lora.init=pissa"), "is no reference"),
        (("adapter_off", "model.method=lora", "model.new_tokens=[a]"), "are trained too"),
        (
            ("adapter_off", "model.method=lora", "model.lora.modules_to_save=[lm_head]"),
            "are trained too",
        ),
        (("frozen_copy", "model.method=lora"), "are there already"),
    ],
)
def test_a_reference_that_the_method_cannot_have_is_refused(
    overrides: tuple[str, ...], message: str
) -> None:
    kind, *others = overrides
    with pytest.raises(ConfigError, match=message):
        read_config(PAIRS, [f"preference.reference={kind}", *others])


def test_frozen_layers_have_a_copy_as_reference() -> None:
    overrides = ["preference.reference=frozen_copy", "model.method=freeze"]
    config = read_config(PAIRS, [*overrides, "model.freeze.trained_layers=1"]).config
    assert config.reference == "frozen_copy"
