"""Memory and micro-batches, against what training took on a GPU."""

import pytest
import torch

from small_doge.errors import UserError
from small_doge.models import DogeForCausalLM, config_for
from small_doge.training.estimates import largest_micro_batch, training_bytes
from small_doge.training.pretrain import pretrain

# Size, rows of 2,048, peak GiB of a compiled step with AdamW: torch.cuda.max_memory_allocated, one H200.
# True: norms and stream left to QuACK's products.
MEASURED = [("20m", 64, 8.42, False), ("20m", 256, 31.3, False), ("60m", 64, 31.21, False), ("160m", 64, 69.52, False)]
MEASURED += [
    ("320m", 64, 123.8, False),
    ("20m", 128, 14.01, True),
    ("60m", 64, 27.29, True),
    ("160m", 64, 60.83, True),
    ("320m", 64, 108.43, True),
]


def sized(size):
    config = config_for(size, vocab_size=32768, max_position_embeddings=2048)
    with torch.device("meta"):
        return config, sum(p.numel() for p in DogeForCausalLM(config).parameters())


@pytest.mark.parametrize(("size", "rows", "gib", "products"), MEASURED)
def test_memory_is_estimated_within_3_percent(size, rows, gib, products):
    estimate = training_bytes(*sized(size), rows, 2048, bf16=True, compiled=True, products=products) / 2**30
    assert abs(estimate / gib - 1) < 0.03


@pytest.mark.parametrize(
    (
        "options",
        "more",
    ),  # elements of 16 bits that a layer keeps of a token: of the SwiGLU's product, and of the stream
    [({}, 512 - 4 * 256), ({"attention_bias": True}, 512), ({"mlp_bias": True}, 0), ({"hidden_dropout": 0.1}, 512)],
)
def test_what_cannot_be_left_to_products_is_counted(options, more):
    config = config_for("20m", vocab_size=32768, **options)
    without, found = (training_bytes(config, 0, 1, 2048, True, True, products) for products in (False, True))
    assert found - without == 2048 * config.num_hidden_layers * 2 * more


def test_the_largest_micro_batch_fits_divides_and_is_worth_it():
    config, parameters = sized("320m")
    found = {n: largest_micro_batch(config, parameters, 1024, 2048, True, True, n << 30) for n in (12, 24, 64, 139)}
    assert found == {12: 2, 24: 8, 64: 16, 139: 64}  # 32 would take 64.5 GiB, and 0.9 of what is free may be used
    assert training_bytes(config, parameters, 32, 2048, True, True) > 0.9 * (64 << 30)
    assert largest_micro_batch(*sized("20m"), 256, 2048, True, True, 139 << 30) == 128  # more would fit and gain little
    assert largest_micro_batch(config, parameters, 51, 2048, True, True, 80 << 30) == 17  # a divisor of 51
    assert largest_micro_batch(*sized("tiny"), 8, 256, False, False, None) == 8
    with pytest.raises(UserError, match="one row of 2,048 tokens needs about .* GiB and 2.0 are free"):
        largest_micro_batch(config, parameters, 1024, 2048, True, True, 2 << 30)


def test_a_found_micro_batch_leaves_the_step_as_it_is(arguments, tmp_path):
    named = pretrain(arguments(max_steps=3, per_device_train_batch_size=4, tokens_per_step=4 * 2 * 32))
    found = arguments(
        max_steps=3, auto_find_batch_size=True, tokens_per_step=4 * 2 * 32, output_dir=str(tmp_path / "b")
    )
    folder = pretrain(found)
    assert found.per_device_train_batch_size * found.gradient_accumulation_steps == 8
    assert found.per_device_train_batch_size == 8
    one, other = (torch.load(f / "training_args.bin", weights_only=False).rows_per_step for f in (named, folder))
    assert one == other == 8


def test_a_micro_batch_is_only_found_for_a_step_that_is_given(arguments):
    with pytest.raises((ValueError, UserError), match="`auto_find_batch_size` is set without `tokens_per_step`"):
        arguments(auto_find_batch_size=True)
