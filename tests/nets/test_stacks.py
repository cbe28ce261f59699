"""What the stacks of blocks have in common."""

import jax
import jax.numpy as jnp
import pytest

from ar_jax.heads.joint_flow import JointNet
from ar_jax.nets.adaln import AdaLN
from ar_jax.nets.gated import Gated
from ar_jax.nets.transformer import Transformer
from ar_jax.nets.vit import GPT, ViT


@pytest.mark.parametrize("stack", [Transformer, Gated, JointNet, AdaLN, ViT, GPT])
def test_heads_that_the_width_does_not_have_are_refused(stack):
    turned = stack in (Transformer, Gated, JointNet)
    for width, heads in [(20, 3), *[(12, 2)] * turned]:
        need = r"a multiple of 4 \(2 axes x 2 channels of a rotary pair\)" if turned else "a whole number"
        with pytest.raises(ValueError, match=rf"{stack.__name__}: width / heads is {width} / {heads}; it must be {need}"):
            jax.eval_shape(stack(1, width, heads).init, jax.random.key(0), jnp.zeros((1, 2, width)))
