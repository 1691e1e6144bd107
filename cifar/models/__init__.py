"""The architectures: a file per family, each mapping (B, 3, 32, 32) images to (B, 10) logits.

A builder's keyword-only parameters are configuration keys; `width` is the channels of the first stage everywhere, and
`width_multiplier` scales a published width table. A model may have two extras: `roles`, a mapping of parameter names to
the roles that optimizers treat apart, and `init_from_data(images)`, called once before training.
"""
