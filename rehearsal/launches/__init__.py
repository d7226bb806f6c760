"""What a training step asks of the card: kernels, calls of cuBLAS, copies and synchronisations, counted at the stand-in
for the driver, for fitune's step and the loops of others on the same batch."""
