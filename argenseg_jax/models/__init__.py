"""The networks, as functional Flax Linen modules.

Axis letters in shapes, one meaning each:
  B batch (sequences)           T sequence length               S key/value length, capacity of a cache
  D model width                 F MLP width                     V (padded) vocabulary
  H query heads                 K key/value heads               G = H / K, query heads per key/value head
  N head dimension              L layers                        P image tiles
  I side of a tile in pixels    M masks                         R side of a mask in pixels
  U codes of a mask             Z scales                        C channels of the VQ-VAE latent
  Q codebook entries            h, w sides of the latent grid   A tokens of an answer
"""
