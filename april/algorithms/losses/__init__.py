"""The loss: ratio -> bounds -> surrogate -> weights -> penalties -> aggregate, put together in `compose`."""
